"""SVRG: mini-batch gradients with a first-order variance correction from a snapshot.

Shapes: n samples of the data, b of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.core.errors import DivergenceError
from vamo_ft.core.offload import Shelf, shelved, shelved_zeros
from vamo_ft.core.parameters import TrainableParameters, all_finite
from vamo_ft.core.perturbation import placed_at
from vamo_ft.core.protocols import Objective, Runtime, SampleSource, StateDict
from vamo_ft.core.transfer import to_device
from vamo_ft.core.types import Batch, Estimate, Work, total_count
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.passes import PassState, SnapshotPasses, reference_samples

__all__ = ["Svrg", "SvrgSettings"]


@dataclass(frozen=True, slots=True)
class SvrgSettings:
    """The knobs of the method.

    Attributes:
        alpha_at: step (counted from 0) -> coefficient of the correction; 0 leaves the step as plain first order.
        snapshot_due: whether a new snapshot is due before a step (never asked for step 0).
        subset: M, samples whose mean gradient stands for the mean over all; None takes all.
        normaliser: data divides the batch's correction by `b Tbar` (exactly zero-mean), batch by its own weight.
        seed: the run's seed.
        offload: keep the snapshot in host memory, once its pass is over.
    """

    alpha_at: Callable[[int], float]
    snapshot_due: Callable[[int], bool]
    subset: int | None
    normaliser: Literal["data", "batch"]
    seed: int
    offload: bool = False


@dataclass(slots=True)
class _Snapshot:
    """One reference point, complete or still in its pass.

    Attributes:
        sums: `sum_i p_i grad L_i(xs)` over the samples seen so far, float32 or wider; on the device during the pass.
        weight: () float64, `sum_i p_i t_i` over the same samples.
        num_samples: `sum_i p_i` over all of them, each as often as steps draw it; 0 during the pass.
        base: the parameters xs; None during the pass, in which they do not move.
    """

    step: int
    sums: Shelf
    weight: Tensor
    scoring: PassState
    num_samples: float = 0.0
    base: Shelf | None = None


class Svrg:
    """`v = grad f_I(x) - alpha_t [ (1/D) sum_{i in I} (grad L_i(xs) - t_i grad f(xs)) ]`.

    L_i is a sample's summed loss, t_i its weight and p_i how often steps draw it, on average 1;
    `grad f(xs) = sum_i p_i grad L_i(xs) / sum_i p_i t_i` is the full gradient at the snapshot xs, and `D = b Tbar` with
    `Tbar = sum_i p_i t_i / n`: the bracket has mean zero over batches drawn by that law, so `E[v] = E[grad f_I(x)]` for
    any alpha. `normaliser="batch"` takes `D = sum_{i in I} t_i`, which is `grad f_I(xs) - grad f(xs)`; with equal
    weights the two are the same.

    alpha = 1 throughout is SVRG; alpha falling linearly to 0 over the run is alpha-SVRG. Gradients at the snapshot are
    taken with dropout off, that at x as `FirstOrder` takes it. Held beyond the gradient: a copy of the parameters, the
    full gradient, and a second copy of the parameters while a batch is evaluated at the snapshot.

    Source: Johnson and Zhang 2013, "Accelerating Stochastic Gradient Descent using Predictive Variance Reduction",
    NIPS 26; Yin et al. 2023, "A Coefficient Makes SVRG Effective", arXiv 2311.05589.
    """

    def __init__(
        self,
        first_order: FirstOrder,
        objective: Objective,
        parameters: TrainableParameters,
        runtime: Runtime,
        *,
        settings: SvrgSettings,
        passes: SnapshotPasses,
    ) -> None:
        self._first_order = first_order
        self._objective = objective
        self._parameters = parameters
        self._runtime = runtime
        self._settings = settings
        self._passes = passes
        self._snapshot: _Snapshot | None = None

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Takes a snapshot when one is due, or goes on with one that was interrupted.

        Costs one forward and one backward pass per sample.

        Raises:
            StopRequested: between two batches of the pass; the state holds the sums so far.
            DivergenceError: the full gradient is not finite.
        """
        snapshot = self._snapshot
        if snapshot is None or (snapshot.step < step and self._settings.snapshot_due(step)):
            snapshot = self._snapshot = self._begin(step)
        if snapshot.scoring.complete:
            return Work()
        self._score(source, snapshot)
        return snapshot.scoring.work

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """Two forward and two backward passes per sample, or one of each where alpha is 0."""
        snapshot, alpha = self._snapshot, self._settings.alpha_at(step)
        assert snapshot is not None and snapshot.base is not None, "prepare comes first"
        first_order = self._first_order.estimate(micro_batches, step)
        work = first_order.work
        if alpha != 0:
            self._correct(snapshot, snapshot.base, micro_batches, alpha=alpha)
            work += work
        metrics = {"alpha": alpha, "snapshot_age": float(step - snapshot.step)}
        return Estimate(loss=first_order.loss, work=work, metrics=metrics)

    def state_dict(self) -> StateDict:
        """The snapshot, also one whose pass is unfinished."""
        if (snapshot := self._snapshot) is None:
            return {"snapshot": None}
        return {
            "snapshot": {
                "step": snapshot.step,
                "sums": snapshot.sums.state(),
                "weight": snapshot.weight,
                "num_samples": snapshot.num_samples,
                "scoring": snapshot.scoring.state_dict(),
                "base": None if snapshot.base is None else snapshot.base.state(),
            }
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        self._snapshot, saved, device = None, state["snapshot"], self._runtime.device
        if saved is not None and (scoring := self._passes.restored(saved["scoring"])) is not None:
            base, offload = saved["base"], self._settings.offload
            sums = (tensor.clone() for tensor in saved["sums"])  # the pass adds to them in place
            self._snapshot = _Snapshot(
                step=saved["step"],
                sums=Shelf(sums, device=device, offload=offload and scoring.complete),
                weight=saved["weight"].to(device, copy=True),
                scoring=scoring,
                num_samples=saved["num_samples"],
                base=None if base is None else Shelf(base, device=device, offload=offload),
            )

    def _begin(self, step: int) -> _Snapshot:
        self._snapshot = None  # the former one need not be kept while there are sums of a new one
        sums = shelved_zeros(self._parameters)
        weight = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        return _Snapshot(step=step, sums=sums, weight=weight, scoring=self._passes.begin())

    def _score(self, source: SampleSource, snapshot: _Snapshot) -> None:
        """The pass: the gradients of all samples are added up, one group of samples after the other."""
        device = self._runtime.device
        reference = reference_samples(
            source, subset=self._settings.subset, seed=self._settings.seed, step=snapshot.step
        )
        with self._passes.over(
            source, reference.samples, stages=1, state=snapshot.scoring, sums=[*snapshot.sums, snapshot.weight]
        ) as stages:
            for batch, _ in stages.batches(0):
                self._parameters.clear_gradients()
                drawn = reference.of(batch.indices)  # (m,)
                self._add_gradient(batch, drawn=to_device(drawn, device))
                for total, tensor in zip(snapshot.sums, self._parameters.tensors, strict=True):
                    if tensor.grad is not None:
                        total += tensor.grad
                snapshot.weight += (to_device(drawn, device) * to_device(batch.counts, device)).sum()
                snapshot.scoring.work += Work.forward([batch]) + Work.backward([batch])
        self._parameters.clear_gradients()
        if not all_finite(snapshot.sums):
            raise DivergenceError(
                f"snapshot of step {snapshot.step}: the full gradient is not finite; the update was not made"
            )
        snapshot.num_samples = float(reference.frequencies.sum())
        snapshot.sums = Shelf(snapshot.sums, device=device, offload=self._settings.offload)
        snapshot.base = shelved(self._parameters, offload=self._settings.offload)
        snapshot.scoring.complete = True

    def _correct(self, snapshot: _Snapshot, base: Shelf, micro_batches: Sequence[Batch], *, alpha: float) -> None:
        """`.grad -= alpha / D * sum_{i in I} (grad L_i(xs) - t_i grad f(xs))`, with no second gradient buffer."""
        device = self._runtime.device
        weight = total_count(micro_batches, device)
        divisor = weight
        if self._settings.normaliser == "data":
            samples = sum(len(batch) for batch in micro_batches)
            divisor = samples * snapshot.weight / snapshot.num_samples
        gradients = self._parameters.gradients()
        if not self._runtime.is_main:  # the gradient so far is the same in all processes, and counts once in their sum
            for gradient in gradients:
                gradient.zero_()
        with placed_at(self._parameters, base):
            for batch in self._runtime.mine(micro_batches):
                self._add_gradient(batch, scale=-alpha / divisor)
        self._runtime.sum_(gradients)
        coefficient = alpha * weight / (divisor * snapshot.weight)
        with torch.no_grad():
            for gradient, total in zip(gradients, snapshot.sums, strict=True):
                gradient += coefficient * total

    def _add_gradient(self, batch: Batch, *, scale: Tensor | float = 1.0, drawn: Tensor | None = None) -> None:
        """`.grad += scale * sum_i drawn_i grad L_i` at the present point, with dropout off."""
        self._objective.module.eval()
        with self._runtime.autocast():
            total = self._objective.terms(batch.to(self._runtime.device)).total
        weighted = total if drawn is None else total * drawn.to(total)
        self._runtime.backward(weighted.sum() * scale)
