"""What the passes of a run allocate, followed on outlines (see `core.allocations`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from vamo_ft.assemble.parts import Parts
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.allocations import AllocationTrace
from vamo_ft.core.hashing import HashKey, direction_keys
from vamo_ft.core.protocols import Directions
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.second_moment import SecondMoment
from vamo_ft.core.types import Batch
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import LossProbe, probe_points

__all__ = ["Outlines", "Peak", "Reach"]


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes beside the weights at the highest point of some work.

    Attributes:
        gradients: of the trained parameters.
        logits: tensors over the vocabulary, with what the loss makes of them.
        gathered: what is put together of a model that processes share out.
        activations: all other tensors of the passes.
    """

    gradients: int = 0
    logits: int = 0
    gathered: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))

    def __add__(self, other: "Peak") -> "Peak":
        return Peak(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class Reach:
    """Directions of which only is known what they reach (implements `core.protocols.Directions`).

    The kernels that form directions hold next to nothing, and are left out.
    """

    def __init__(self, numel: int, *, rowwise: bool, support: tuple[int, ...]) -> None:
        self.numel = numel
        self.rowwise = rowwise
        self._support = support

    def support(self, keys: Sequence[HashKey]) -> tuple[int, ...]:
        """The same for all keys."""
        return self._support

    def axpy_(
        self,
        tensors: Sequence[Tensor],
        coefficients: Tensor,
        keys: Sequence[HashKey],
        *,
        scales: Sequence[float] | None = None,
        rounding: HashKey | None = None,
        sources: Sequence[Tensor] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Writes in place."""

    def displaced_rows(
        self,
        values: Tensor,
        rows: Tensor,
        *,
        index: int,
        coefficients: Tensor,
        keys: Sequence[HashKey],
        rounding: HashKey | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """A tensor like `values`, or `out`."""
        return torch.empty_like(values) if out is None else out

    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        """Of the right shape."""
        return torch.ones(len(keys), dtype=torch.float64)

    def gram(self, keys: Sequence[HashKey]) -> Tensor:
        """Of the right shape."""
        return torch.eye(len(keys), dtype=torch.float64)

    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        """Not asked for."""
        raise AssertionError("no estimate is made")


class _Marked(LocalRuntime):
    """Knows whether a backward pass is running."""

    in_backward = False

    def backward(self, loss: Tensor) -> None:
        """Back-propagates a scalar."""
        self.in_backward = True
        try:
            super().backward(loss)
        finally:
            self.in_backward = False


class Outlines:
    """Passes over a model without values; each leaves it as it was."""

    def __init__(self, config: RunConfig, parts: Parts) -> None:
        model = parts.loaded.model
        self._config = config
        self._parts = parts
        self._runtime = _Marked(autocast=torch.bfloat16 if config.training.autocast else None)
        self._held = [*model.parameters(), *model.buffers()]
        self._shapes = {tensor.shape for tensor in (*parts.parameters.registered, *parts.parameters.tensors)}
        head = model.get_output_embeddings()
        self._classes = model.get_input_embeddings().weight.shape[0] if head is None else head.weight.shape[0]
        self.weights = AllocationTrace(self._held).now

    def training(self, batches: Sequence[Batch]) -> Peak:
        """Forward and backward passes of one step over its micro-batches."""
        estimator = FirstOrder(self._parts.objective, self._parts.parameters, self._runtime, seed=0)
        with self._traced() as trace:
            estimator.estimate(batches, 0)
        return self._peak(trace)

    def probes(self, batches: Sequence[Batch], directions: Directions) -> Peak:
        """The forward passes of one probe at its two points, with the displaced weights."""
        parts, keys = self._parts, direction_keys(0, 0, 1)
        probe = LossProbe(parts.objective, parts.parameters, directions, self._runtime)
        with self._traced() as trace:
            for _ in probe.evaluate(batches, probe_points("central", num_probes=1, eps=1.0), keys):
                pass
        return self._peak(trace)

    @torch.no_grad()
    def evaluation(self, batch: Batch) -> Peak:
        """Losses of a batch, and scores of options; answers are not generated."""
        objective = self._parts.objective
        objective.module.eval()
        with self._traced() as trace, self._runtime.autocast():
            if self._config.evaluation.answer_tokens is None:
                objective.evaluate(batch)
            else:
                objective.terms(batch)
        return self._peak(trace)

    @contextmanager
    def _traced(self) -> Iterator[AllocationTrace]:
        trace = AllocationTrace(self._held, label=self._label, resized="gathered")
        try:
            with trace:
                yield trace
        finally:
            self._parts.parameters.clear_gradients()

    def _label(self, tensor: Tensor) -> str:
        exchanged = self._parts.parameters.sharded and tensor.ndim == 1
        if self._runtime.in_backward and (exchanged or tensor.shape in self._shapes):
            return "gradients"
        if exchanged:
            return "gathered"
        return "logits" if tensor.ndim > 1 and tensor.shape[-1] == self._classes else "activations"

    def _peak(self, trace: AllocationTrace) -> Peak:
        before = AllocationTrace(self._held, label=self._label).parts
        labels = ("gradients", "logits", "gathered", "activations")
        return Peak(*(trace.parts.get(label, 0) - before.get(label, 0) for label in labels))
