"""The one way to reach a probe point `x + a z`, and back."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.hooks import RemovableHandle

from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.memory import is_allocation_failure
from vamo_ft.core.offload import Shelf
from vamo_ft.core.parameters import TrainableParameters, num_weights
from vamo_ft.core.protocols import Directions
from vamo_ft.core.stack import Owners, owners_of, replace_forward, restore_forward, stacked_layers

__all__ = ["Perturber", "placed_at", "point_rounding"]

_log = logging.getLogger("vamo_ft")

_COPY_UP_TO = 0.05  # share of the weights
_ROWWISE_FROM = 1 << 20  # elements of an embedding or head; a smaller one is copied
_HEAD_ELEMENTS = 1 << 22  # of the head, displaced at one time: its rows in a power of two
_ALIGNMENT = 256  # bytes, at which vectorised kernels expect a tensor to begin


@contextmanager
def placed_at(parameters: TrainableParameters, values: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the parameters hold `values`; afterwards, also after an error, their old bits.

    These wait where the values come from: in host memory beside values that are kept there.
    """
    copies = (tensor.detach().clone() for tensor in parameters.tensors)
    saved = values.like(copies) if isinstance(values, Shelf) else tuple(copies)
    try:
        parameters.assign(values)
        yield
    finally:
        parameters.assign(saved)


def point_rounding(key: HashKey, coefficient: float) -> HashKey:
    """The stream that rounds the values of the probe point `x + coefficient * z(key)`."""
    return HashKey(key.seed, Domain.ROUNDING, key.step, 2 * key.probe + (coefficient < 0))


class Perturber:
    """Puts a module at probe points without ever writing to its parameters.

    Displaced values go to a buffer, and the parameter's `data` points there for as long as they are needed; its own
    memory is not touched, so that the parameters come back bit for bit in every precision, and an evaluation costs one
    pass over them. Values of bfloat16 and float16 are rounded stochastically: their mean is `x + a z`, where nearest
    rounding would move small weights too far and large ones not at all.

    - Copy: all displaced tensors exist at once. Used where the direction reaches at most 5 % of the weights (adapters,
      single blocks) and for small tensors.
    - Streamed: a layer of a stack is displaced when it is entered, into one buffer that all layers share. A large
      embedding is displaced in the rows that are looked up, a large head some rows at a time, in the same buffer.
    - What a `LayerStream` holds on the host is displaced where it brings it in.

    A tensor that several layers share, or a layer and something around it, is copied. Before a set of tensors is
    streamed, one batch is evaluated with all of them turned to NaN outside their layers: a model that reads a weight at
    another time than in its layer's forward pass gives another loss, or an error, and is copied as a whole from then
    on, with a log line.

    Args:
        whole: always copy, as for generation, which runs many forward passes at one point.
    """

    def __init__(
        self, module: nn.Module, parameters: TrainableParameters, directions: Directions, *, whole: bool = False
    ) -> None:
        self._module = module
        self._parameters = parameters
        self._directions = directions
        self._whole = whole
        self._verified: set[_Layout] = set()
        self._layouts: dict[tuple[int, ...], _Layout] = {}
        self._copies, self._layer = _Buffer(), _Buffer()
        self._divisible: dict[tuple[int, int], bool] = {}  # of a head and a number of vectors, see `_project`
        self._point: _Point | None = None

    @contextmanager
    def at(self, key: HashKey, coefficient: float) -> Iterator[None]:
        """Within the block the module computes at `x + coefficient * z(key)`; afterwards, also after an error, at x."""
        assert self._point is None, "one probe point at a time"
        point = self._point = _Point(
            self._parameters,
            self._directions,
            key,
            coefficient,
            layout=self._layout(self._directions.support([key])),
            copies=self._copies,
            layer=self._layer,
            divisible=self._divisible,
        )
        try:
            with self._parameters.displaced(point.layout.held, point.displace):
                point.enter()
                yield
        finally:
            point.leave()
            self._point = None

    def checked(self, evaluate: Callable[[], Tensor], *, plain: Callable[[], Tensor] | None = None) -> Tensor:
        """`evaluate()` at the present point; the first time that something is streamed, with the proof that it may be.

        Args:
            evaluate: losses by forward passes of the module.
            plain: the same with nothing carried over from an earlier evaluation, for the proof; None: `evaluate` is so.
        """
        point = self._point
        if point is None or not point.layout.streams or point.layout in self._verified:
            return evaluate()
        losses = evaluate()
        if not losses.isfinite().all():  # proves nothing; a later evaluation will
            return losses
        point.poison(outside=True)
        hidden = None
        try:
            hidden = (plain or evaluate)()
        except Exception as error:  # whatever a model does with weights that it should not have read
            if is_allocation_failure(error):
                raise
            _log.debug("evaluation with streamed tensors hidden: %s", error)
        finally:
            point.poison(outside=False)
        agrees = hidden is not None and torch.equal(hidden, losses)
        if hidden is not None and not agrees and hidden.isfinite().all():
            agrees = not torch.equal(evaluate(), losses)  # the bits vary from pass to pass, as on some devices
        self._verified.add(point.layout)
        if agrees:
            return losses
        _log.info(
            "the model reads weights outside their layer's forward pass; probe points are reached by a copy of the "
            "trained parameters"
        )
        self._whole = True
        self._layouts.clear()
        point.copy_all(self._layout(self._directions.support([point.key])))
        return evaluate()

    @cached_property
    def _owners(self) -> tuple[Owners, ...]:
        return owners_of(self._module, self._parameters.registered)

    def _layout(self, support: tuple[int, ...]) -> "_Layout":
        if support not in self._layouts:
            self._layouts[support] = self._arranged(support)
        return self._layouts[support]

    def _arranged(self, support: tuple[int, ...]) -> "_Layout":
        tensors = self._parameters.tensors
        held = tuple(self._parameters.streamed(support))
        support = tuple(index for index in support if index not in held)
        reached = sum(tensors[index].numel() for index in support)
        if self._whole or reached <= _COPY_UP_TO * sum(map(num_weights, self._module.parameters())):
            return _Layout(support, (), (), held)
        layers = stacked_layers(self._module)
        copied: list[int] = []
        streamed: dict[int, list[int]] = {}
        rows: list[tuple[int, tuple[nn.Module, ...]]] = []
        for index in support:
            owners = self._owners[index]
            if len(owners.layers) == 1 and not owners.outside:
                streamed.setdefault(owners.layers[0], []).append(index)
            elif self._by_rows(index, owners):
                rows.append((index, owners.outside))
            else:
                copied.append(index)
        by_layer = tuple((layers[number], tuple(indices)) for number, indices in streamed.items())
        return _Layout(tuple(copied), by_layer, tuple(rows), held)

    def _by_rows(self, index: int, owners: Owners) -> bool:
        """Whether every use of the tensor is the lookup of a plain embedding or the product of a plain head."""
        tensor = self._parameters.tensors[index]
        return (
            self._directions.rowwise
            and tensor.numel() >= _ROWWISE_FROM
            and tensor.is_contiguous()
            and not owners.layers
            and bool(owners.outside)
            and all(
                (type(module) is nn.Embedding and module.max_norm is None)
                or (type(module) is nn.Linear and module.weight is tensor)
                for module in owners.outside
            )
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the tensors of a support are displaced.

    Attributes:
        copied: for as long as the point is held.
        layers: modules, and what is displaced while they run.
        rows: tensors that are displaced row by row, and the embeddings and heads that use them.
        held: on the host, while their layer does not run.
    """

    copied: tuple[int, ...]
    layers: tuple[tuple[nn.Module, tuple[int, ...]], ...]
    rows: tuple[tuple[int, tuple[nn.Module, ...]], ...]
    held: tuple[int, ...]

    @property
    def streams(self) -> bool:
        return bool(self.layers or self.rows)

    @property
    def streamed(self) -> tuple[int, ...]:
        """The tensors that hold their own values outside their modules."""
        return tuple(index for _, indices in self.layers for index in indices) + tuple(index for index, _ in self.rows)


class _Buffer:
    """Memory for displaced values; grows to the largest request and is kept."""

    def __init__(self) -> None:
        self._flat: dict[torch.dtype, Tensor] = {}

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same shapes and types, contiguous, with undefined values; the former ones are given up."""
        used: dict[torch.dtype, int] = {}
        places = []
        for tensor in tensors:
            places.append(used.get(tensor.dtype, 0))
            step = _ALIGNMENT // tensor.element_size()
            used[tensor.dtype] = places[-1] + -(-tensor.numel() // step) * step
        for dtype, numel in used.items():
            if dtype not in self._flat or self._flat[dtype].numel() < numel:
                self._flat.pop(dtype, None)
                self._flat[dtype] = torch.empty(numel, dtype=dtype, device=tensors[0].device)
        return [
            self._flat[tensor.dtype][place : place + tensor.numel()].view(tensor.shape)
            for tensor, place in zip(tensors, places, strict=True)
        ]


class _Point:
    """One probe point while it is held."""

    def __init__(
        self,
        parameters: TrainableParameters,
        directions: Directions,
        key: HashKey,
        coefficient: float,
        *,
        layout: _Layout,
        copies: _Buffer,
        layer: _Buffer,
        divisible: dict[tuple[int, int], bool],
    ) -> None:
        self.key = key
        self.layout = layout
        self._parameters = parameters
        self._directions = directions
        self._coefficients = torch.full((1,), coefficient, dtype=torch.float64, device=parameters.device)
        self._rounding = point_rounding(key, coefficient)
        self._copies, self._layer, self._divisible = copies, layer, divisible
        self._own = {index: parameters.tensors[index].data for index in (*layout.copied, *layout.streamed)}
        self._outside = {index: self._own[index] for index in layout.streamed}
        self._open = 0  # layers that are running
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []

    def enter(self) -> None:
        """Displaces what is copied, and gets the rest ready."""
        self._displace(self.layout.copied, self._copies)
        for module, indices in self.layout.layers:
            self._handles.append(module.register_forward_pre_hook(self._on_entry(indices)))
            self._handles.append(module.register_forward_hook(self._on_exit(indices)))
        for index, modules in self.layout.rows:
            for module in modules:
                self._replace(module, index)

    def leave(self) -> None:
        """Gives every parameter its own memory again."""
        self._release()
        for index, own in self._own.items():
            self._parameters.tensors[index].data = own

    def poison(self, *, outside: bool) -> None:
        """Lets streamed tensors be NaN, or what they are, outside their modules."""
        for index in self._outside:
            own = self._own[index]
            self._outside[index] = own.new_full((), torch.nan).expand(own.shape) if outside else own
            self._parameters.tensors[index].data = self._outside[index]

    def copy_all(self, layout: _Layout) -> None:
        """Displaces everything for as long as the point is held."""
        self._release()
        self.layout = layout
        self._displace(layout.copied, self._copies)

    def displace(self, values: Sequence[Tensor], indices: Sequence[int]) -> None:
        """Displaces values of the parameters `indices`, in place."""
        self._directions.axpy_(values, self._coefficients, [self.key], rounding=self._rounding, indices=indices)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, previous in self._replaced:
            restore_forward(module, previous)
        self._handles.clear()
        self._replaced.clear()

    def _displace(self, indices: Sequence[int], buffer: _Buffer) -> None:
        if not indices:
            return
        sources = [self._own[index] for index in indices]
        displaced = buffer.like(sources)
        self._directions.axpy_(
            displaced, self._coefficients, [self.key], rounding=self._rounding, sources=sources, indices=indices
        )
        for index, values in zip(indices, displaced, strict=True):
            self._parameters.tensors[index].data = values

    def _on_entry(self, indices: tuple[int, ...]) -> Callable[[nn.Module, object], None]:
        def displace(module: nn.Module, arguments: object) -> None:
            self._displace(indices, self._free_buffer())
            self._open += 1

        return displace

    def _on_exit(self, indices: tuple[int, ...]) -> Callable[[nn.Module, object, object], None]:
        def restore(module: nn.Module, arguments: object, output: object) -> None:
            for index in indices:
                self._parameters.tensors[index].data = self._outside[index]
            self._open -= 1

        return restore

    def _free_buffer(self) -> _Buffer:
        """The layers' buffer, or another one within a layer that is displaced there."""
        return _Buffer() if self._open else self._layer

    def _replace(self, module: nn.Module, index: int) -> None:
        own = self._own[index]
        self._replaced.append((module, vars(module).get("forward")))
        if isinstance(module, nn.Embedding):
            replace_forward(module, lambda input: self._look_up(own, input, index=index))
        else:
            assert isinstance(module, nn.Linear)
            replace_forward(module, lambda input: self._project(own, input, index=index, bias=module.bias))

    def _rows(self, values: Tensor, rows: Tensor, *, index: int, out: Tensor | None = None) -> Tensor:
        return self._directions.displaced_rows(
            values,
            rows,
            index=index,
            coefficients=self._coefficients,
            keys=[self.key],
            rounding=self._rounding,
            out=out,
        )

    def _look_up(self, weight: Tensor, tokens: Tensor, *, index: int) -> Tensor:
        """The embedding's rows of the tokens, displaced."""
        rows = tokens.reshape(-1).long()
        return self._rows(embedding(rows, weight), rows, index=index).view(*tokens.shape, -1)

    def _project(self, weight: Tensor, hidden: Tensor, *, index: int, bias: Tensor | None) -> Tensor:
        """The head's product, some of its rows at a time where that changes no bit."""
        step = 1 << max(0, (_HEAD_ELEMENTS // weight.shape[1]).bit_length() - 1)
        product = index, hidden.numel() // weight.shape[1]
        if product not in self._divisible:
            whole = torch.split(linear(hidden, weight, bias), step, dim=-1)
            parts = zip(whole, _parts(weight, bias, step), strict=True)
            self._divisible[product] = all(torch.equal(logits, linear(hidden, w, b)) for logits, (w, b) in parts)
        step = step if self._divisible[product] else len(weight)
        rows, buffer = torch.split(torch.arange(len(weight), device=weight.device), step), self._free_buffer()
        return torch.cat(
            [
                linear(hidden, self._rows(w, part, index=index, out=buffer.like([w])[0]), b)
                for (w, b), part in zip(_parts(weight, bias, step), rows, strict=True)
            ],
            dim=-1,
        )


def _parts(weight: Tensor, bias: Tensor | None, step: int) -> list[tuple[Tensor, Tensor | None]]:
    weights = torch.split(weight, step)
    return list(zip(weights, [None] * len(weights) if bias is None else torch.split(bias, step), strict=True))
