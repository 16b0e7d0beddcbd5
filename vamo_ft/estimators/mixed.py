"""First and zeroth order in one step, by the length of the samples (Addax)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vamo_ft.core.micro_batches import micro_batches_of
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Runtime, SampleSource
from vamo_ft.core.types import Batch, Estimate, ProjectedGradient, Work, total_count
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.estimators.stateless import Stateless

__all__ = ["Addax"]


class Addax(Stateless):
    """`v = w ghat_{I0}(x) + (1 - w) grad f_{I1}(x)`: long samples without their activations, short ones with them.

    I0 are the samples of the step that are longer than `boundary`, I1 the others. f_I is the mean loss per token over
    the samples of I alone, `sum_I L_i / sum_I t_i`; `ghat` is the estimate of `Spsa`, w the paper's alpha. So where
    both kinds are there, `E[v]` is `w grad f_0 + (1 - w) grad f_1`, with f_0 and f_1 the mean losses of the long and of
    the short samples of the data (up to the small bias of a ratio where token counts differ). It is the gradient of the
    mean over all data only where w is the long samples' share of its tokens; a smaller w attends less to them, and
    holds down the noise, the norm of which is about sqrt(d) times that of the gradient.

    The paper draws I0 and I1 apart, so that neither is ever empty; here a step's samples are split. What a step has
    none of is left out, and the other term keeps its weight: v stays linear in both, so that over all steps
    `E[v] = w P(I0 not empty) grad f_0 + (1 - w) P(I1 not empty) grad f_1`. With the weight 1 instead, a step of long
    samples only would move 1/w times as far along its noise as every other.

    The samples are collated anew, long and short ones apart, in parts as large as the largest micro-batch, so that no
    short one is padded to a long one: back-propagation holds activations of rows of at most `boundary` tokens. The
    zeroth-order part comes first, before there is any gradient. Dropout is on in the first-order part only.

    Args:
        first_order: gives `grad f_{I1}`.
        zeroth_order: gives `ghat_{I0}`.
        directions: those of `zeroth_order`; none that depends on the parameters' values.
        boundary: tokens of the longest row that is back-propagated.
        weight: w, above 0 and below 1.

    Source: Li et al. 2024, "Addax: Utilizing Zeroth-Order Gradients to Improve Memory Efficiency and Performance of SGD
    for Fine-Tuning Language Models", arXiv 2410.06441, equation 3 and Algorithm 1.
    """

    def __init__(
        self,
        first_order: FirstOrder,
        zeroth_order: Spsa,
        parameters: TrainableParameters,
        directions: Directions,
        runtime: Runtime,
        *,
        boundary: int,
        weight: float,
    ) -> None:
        self._first_order = first_order
        self._zeroth_order = zeroth_order
        self._parameters = parameters
        self._directions = directions
        self._runtime = runtime
        self._boundary = boundary
        self._weight = weight
        self._source: SampleSource | None = None

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Nothing is due; `source` is kept, for lengths and batches."""
        self._source = source
        return Work()

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """2q or q + 1 forward passes per long sample, a forward and a backward pass per short one.

        Raises:
            VamoFtError: the losses of the long samples do not depend on the perturbation.
        """
        source = self._source
        assert source is not None, "prepare comes first"
        indices = [index for batch in micro_batches for index in batch.indices]
        size = max(len(batch) for batch in micro_batches)
        long = [index for index in indices if source.length(index) > self._boundary]
        short = [index for index in indices if source.length(index) <= self._boundary]
        self._parameters.clear_gradients()
        parts: list[tuple[Sequence[Batch], Estimate]] = []
        for samples, estimator in ((long, self._zeroth_order), (short, self._first_order)):
            if samples:
                batches = micro_batches_of(source, samples, size)
                parts.append((batches, estimator.estimate(batches, step)))
        for tensor in self._parameters.tensors:
            if tensor.grad is not None:
                tensor.grad.mul_(1 - self._weight)
        for _, part in parts:
            if part.projected is not None:
                self._add(part.projected)
        weights = torch.stack([total_count(batches, self._runtime.device) for batches, _ in parts])
        losses = torch.stack([part.loss for _, part in parts])
        metrics: dict[str, Tensor | float] = {"long_share": len(long) / len(indices)}
        for _, part in parts:
            metrics.update(part.metrics)
        return Estimate(
            loss=(weights * losses).sum() / weights.sum(),
            work=sum((part.work for _, part in parts), Work()),
            metrics=metrics,
        )

    def _add(self, projected: ProjectedGradient) -> None:
        """`.grad <- .grad + w ghat`; a tensor that is reached and has no gradient yet starts from zeros."""
        support = self._directions.support(projected.keys)
        gradients = self._parameters.gradients(support)
        self._directions.axpy_(gradients, self._weight * projected.coefficients, projected.keys, indices=support)
