"""Evaluates several points that differ only in later layers without running the earlier ones again."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vamo_ft.core.memory import is_allocation_failure
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.stack import Owners, Replay, layer_stacks, owners_of, replace_forward, restore_forward

__all__ = ["PrefixReuse"]

_log = logging.getLogger("vamo_ft")


class PrefixReuse:
    """Where only layers from number k on are displaced, the output of layer k - 1 is the same at every probe point.

    The first evaluation of a batch keeps that output; in the later ones the layers below k return it at once. One block
    of a stack then costs 1.5 forward passes in place of 2 on average (MeZO-BCD, arXiv 2501.19099, perturbs one block a
    step). The first reuse for every support is compared with a plain evaluation; where they differ in a bit, or the
    layers are not one stack whose members run one after the other, nothing is reused from then on, with a log line.
    """

    def __init__(self, module: nn.Module, parameters: TrainableParameters) -> None:
        self._module = module
        self._parameters = parameters
        self._proven: set[tuple[int, ...]] = set()  # supports
        self._reused: dict[tuple[int, ...], int] = {}
        self._allowed = True

    def depth(self, support: Sequence[int]) -> int:
        """The number of layers at the beginning of the stack that the parameters `support` are not part of."""
        layers = self._layers
        if not self._allowed or not layers:
            if self._allowed and len(support) < len(self._parameters.tensors):
                self._forbid("the model is not one stack of layers")
            return 0
        owners = [self._owners[index] for index in support]
        if any(not owner.layers and not owner.outside for owner in owners):
            return 0
        return min([number for owner in owners for number in owner.layers], default=len(layers))

    @contextmanager
    def batch(self, support: Sequence[int]) -> Iterator[Callable[[Callable[[], Tensor]], Tensor]]:
        """Within the block one batch is evaluated at several points that differ in `support` alone.

        Yields:
            a function that takes an evaluation (one forward pass of the module, giving the losses) and performs it.
        """
        below = self._layers[: self.depth(support)]
        outside = [part for index in support for part in self._owners[index].outside]
        kept: _Kept | None = None

        def evaluate(losses: Callable[[], Tensor]) -> Tensor:
            nonlocal kept, below
            if not below or not self._allowed:
                return losses()
            if kept is None:
                kept = _Kept(below, self._layers)
                with kept.recording(outside):
                    result = losses()
                if not kept.in_order:
                    self._forbid("they do not run once each, one after the other")
                elif not kept.outside_runs_last:
                    below = ()
                return result
            proven = tuple(support) in self._proven
            reused: list[Tensor] = []
            try:
                with kept.replayed(), nullcontext() if proven else _outputs_of(self._module, reused):
                    result = losses()
                    reused.append(result)
            except Exception as error:  # whatever a layer finds missing that an earlier one should have left
                if proven or is_allocation_failure(error):
                    raise
                self._forbid(f"a layer fails without them ({type(error).__name__})")
                return losses()
            return result if proven else self._compared(reused, losses, tuple(support))

        yield evaluate
        self._reused[tuple(support)] = len(below)

    def reused(self, support: Sequence[int]) -> int:
        """The number of layers that each evaluation but the first did without, in the last batch with this support."""
        return self._reused.get(tuple(support), 0) if self._allowed else 0

    def _compared(self, reused: list[Tensor], losses: Callable[[], Tensor], support: tuple[int, ...]) -> Tensor:
        """The losses by a plain evaluation; it proves reuse when the module's outputs are the same to the last bit."""
        plain: list[Tensor] = []
        with _outputs_of(self._module, plain):
            result = losses()
            plain.append(result)
        if result.isfinite().all():  # otherwise it proves nothing; a later evaluation will
            self._proven.add(support)
            if len(plain) != len(reused) or not all(torch.equal(a, b) for a, b in zip(plain, reused, strict=True)):
                self._forbid("the result differs when their output is carried over")
        return result

    def _forbid(self, reason: str) -> None:
        _log.info("the layers below a perturbed block are evaluated at every probe point: %s", reason)
        self._allowed = False

    @cached_property
    def _layers(self) -> tuple[nn.Module, ...]:
        stacks = layer_stacks(self._module)
        return stacks[0] if len(stacks) == 1 else ()

    @cached_property
    def _owners(self) -> tuple[Owners, ...]:
        return owners_of(self._module, self._parameters.registered)


class _Kept:
    """The output of the last of the layers `below`, from one forward pass."""

    def __init__(self, below: Sequence[nn.Module], layers: Sequence[nn.Module]) -> None:
        self._below = below
        self._layers = layers
        self._output: Any = None
        self.in_order = self.outside_runs_last = False

    @contextmanager
    def recording(self, outside: Sequence[nn.Module]) -> Iterator[None]:
        """Keeps the output, and notes in which order layers and the modules `outside` run."""
        calls: list[nn.Module] = []
        handles = [part.register_forward_pre_hook(lambda part, _: calls.append(part)) for part in self._layers]
        handles += [part.register_forward_pre_hook(lambda part, _: calls.append(part)) for part in set(outside)]
        handles.append(self._below[-1].register_forward_hook(self._keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        layers = set(self._layers)
        self.in_order = [part for part in calls if part in layers] == list(self._layers)
        after = calls[calls.index(self._layers[-1]) + 1 :] if self.in_order else []
        self.outside_runs_last = all(calls.count(part) == after.count(part) > 0 for part in outside)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within the block every layer below returns what was kept."""
        before = [vars(layer).get("forward") for layer in self._below]
        try:
            for layer in self._below:
                replace_forward(layer, Replay(self._output, like=layer.forward))
            yield
        finally:
            for layer, previous in zip(self._below, before, strict=True):
                restore_forward(layer, previous)

    def _keep(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        self._output = output


@contextmanager
def _outputs_of(module: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Within the block the tensors that the module returns are added to `outputs`: scores may hide that they differ."""
    handle = module.register_forward_hook(lambda module, arguments, output: outputs.extend(_tensors(output)))
    try:
        yield
    finally:
        handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
