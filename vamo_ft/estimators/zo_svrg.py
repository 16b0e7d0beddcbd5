"""ZO-SVRG and MeZO-SVRG: zeroth-order estimates with a zeroth-order variance correction from a snapshot.

Shapes: n samples of the data, b of a batch, q probes (`num_probes`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.errors import DivergenceError
from vamo_ft.core.hashing import HashKey, direction_keys
from vamo_ft.core.offload import Shelf, shelved
from vamo_ft.core.parameters import TrainableParameters, all_finite
from vamo_ft.core.perturbation import placed_at
from vamo_ft.core.protocols import Runtime, SampleSource, StateDict
from vamo_ft.core.transfer import to_device
from vamo_ft.core.types import Batch, Estimate, ProjectedGradient, Work, total_count
from vamo_ft.estimators.passes import PassState, SnapshotPasses, reference_samples
from vamo_ft.estimators.probes import Difference, LossProbe, not_reached, probe_points
from vamo_ft.estimators.sharing import put_together

__all__ = ["ZoSvrg", "ZoSvrgSettings"]


@dataclass(frozen=True, slots=True)
class ZoSvrgSettings:
    """The knobs of the method.

    Attributes:
        num_probes: q, of a step and of a snapshot.
        eps: perturbation per coordinate.
        difference: central or forward.
        snapshot_due: whether a new snapshot is due before a step (never asked for step 0).
        subset: M, samples whose mean stands for the mean over all; None takes all.
        full_step_scale: lr1 / lr2, multiplies the estimate of the snapshot's own step.
        seed: the run's seed; directions are keyed by (seed, step, probe).
        piecewise_constant: the objective moves in jumps, as a metric does: losses that are the same at all probe points
            of a snapshot are then no error.
        offload: keep the snapshot's parameters in host memory.
    """

    num_probes: int
    eps: float
    difference: Difference
    snapshot_due: Callable[[int], bool]
    subset: int | None
    full_step_scale: float
    seed: int
    piecewise_constant: bool = False
    offload: bool = False


@dataclass(slots=True)
class _Snapshot:
    """One reference point, complete or still in its pass.

    Attributes:
        sums: (q,) float64, derivatives of the summed losses of the samples seen so far, each as often as it is drawn.
        weight: () float64, the sum of their weights, counted alike.
        base: the parameters xs; None during the pass, in which they do not move.
    """

    step: int
    sums: Tensor
    weight: Tensor
    scoring: PassState
    base: Shelf | None = None


class ZoSvrg:
    """`v = ghat_I(x) - ghat_I(xs) + ghat(xs)`, as coefficients of 2q directions:

        v = (1/q) sum_j [c_I(x; z_j) - c_I(xs; z_j)] z_j + (1/q) sum_j C_j u_j

    `c_I(.; z)` is the derivative along z of the mean loss over the step's own weight, by finite differences, and z_j
    the step's directions: the same at x and at the snapshot xs, so that the two terms tell how far the batch's gradient
    has moved, and cancel to the last bit at x = xs. `C_j` is the derivative of the data's mean loss at xs along the
    snapshot's own q directions u_j, which all samples share. z_j is keyed by (seed, step, j) and u_j by (seed, the
    snapshot's step, q + j), so that no two are the same.

    In the snapshot's own step x = xs, and only the last term is left: a step along the full zeroth-order gradient. Here
    the batch is evaluated once, for its loss. MeZO-SVRG is a short period in which this step has a learning rate of its
    own: `full_step_scale` is lr1 / lr2, of which lr2 is the update rule's. That holds for plain SGD.

    Until the next snapshot every step moves along the same u_j, which adds up: learning rate times period counts.

    Held between steps: a copy of the parameters at the snapshot; never a gradient.

    Source: Liu et al. 2018, "Zeroth-Order Stochastic Variance Reduction for Nonconvex Optimization", arXiv 1805.10367,
    Algorithm 2; Gautam et al. 2024, "Variance-reduced Zeroth-Order Methods for Fine-Tuning Language Models",
    arXiv 2404.08080, Algorithm 1.
    """

    def __init__(
        self,
        probe: LossProbe,
        parameters: TrainableParameters,
        runtime: Runtime,
        *,
        settings: ZoSvrgSettings,
        passes: SnapshotPasses,
    ) -> None:
        self._probe = probe
        self._parameters = parameters
        self._runtime = runtime
        self._settings = settings
        self._passes = passes
        self._points = probe_points(settings.difference, num_probes=settings.num_probes, eps=settings.eps)
        self._snapshot: _Snapshot | None = None

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Takes a snapshot when one is due, or goes on with one that was interrupted.

        Costs 2q (central) or q + 1 (forward) forward passes per sample.

        Raises:
            StopRequested: between two batches of the pass; the state holds the sums so far.
            DivergenceError: a loss is not finite.
            VamoFtError: the losses do not depend on the perturbation, and are not piecewise constant.
        """
        snapshot = self._snapshot
        if snapshot is None or (snapshot.step < step and self._settings.snapshot_due(step)):
            snapshot = self._snapshot = self._begin(step)
        if snapshot.scoring.complete:
            return Work()
        self._score(source, snapshot)
        return snapshot.scoring.work

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """4q (central) or 2q + 2 (forward) forward passes per sample; one in the snapshot's own step."""
        snapshot, settings = self._snapshot, self._settings
        assert snapshot is not None and snapshot.base is not None, "prepare comes first"
        weight = total_count(micro_batches, self._runtime.device)
        full = snapshot.sums / snapshot.weight  # (q,) C
        full_keys = self._keys(snapshot.step, first=settings.num_probes)
        metrics: dict[str, Tensor | float] = {
            "full_gradient": full.abs().mean(),
            "snapshot_age": float(step - snapshot.step),
        }
        if snapshot.step == step:
            own = [self._probe.losses(batch) for batch in self._runtime.mine(micro_batches)]
            here = put_together(self._runtime, micro_batches, own)  # (b,)
            return Estimate(
                loss=here.sum() / weight,
                work=Work.forward(micro_batches),
                projected=ProjectedGradient(settings.full_step_scale * full / settings.num_probes, full_keys),
                metrics=metrics,
            )
        keys = self._keys(step, first=0)
        derivatives, total = self._probe.derivatives(micro_batches, self._points, keys)  # (b, q)
        with placed_at(self._parameters, snapshot.base):
            at_snapshot, _ = self._probe.derivatives(micro_batches, self._points, keys)  # (b, q)
        work = self._probe.work(micro_batches, self._points, keys)
        moved = (derivatives - at_snapshot).sum(0) / weight  # (q,)
        return Estimate(
            loss=total / weight,
            work=work + work,
            projected=ProjectedGradient(torch.cat([moved, full]) / settings.num_probes, keys + full_keys),
            metrics={"projected_gradient": moved.abs().mean(), **metrics},
        )

    def state_dict(self) -> StateDict:
        """The snapshot, also one whose pass is unfinished."""
        if (snapshot := self._snapshot) is None:
            return {"snapshot": None}
        return {
            "snapshot": {
                "step": snapshot.step,
                "sums": snapshot.sums,
                "weight": snapshot.weight,
                "scoring": snapshot.scoring.state_dict(),
                "base": None if snapshot.base is None else snapshot.base.state(),
            }
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`; directions are made anew from the keys."""
        self._snapshot, saved, device = None, state["snapshot"], self._runtime.device
        if saved is not None and (scoring := self._passes.restored(saved["scoring"])) is not None:
            base = saved["base"]
            self._snapshot = _Snapshot(
                step=saved["step"],
                sums=saved["sums"].to(device, copy=True),  # the pass adds to them in place
                weight=saved["weight"].to(device, copy=True),
                scoring=scoring,
                base=None if base is None else Shelf(base, device=device, offload=self._settings.offload),
            )

    def _keys(self, step: int, *, first: int) -> tuple[HashKey, ...]:
        return direction_keys(self._settings.seed, step, self._settings.num_probes, first=first)

    def _begin(self, step: int) -> _Snapshot:
        sums = torch.zeros(self._settings.num_probes, dtype=torch.float64, device=self._runtime.device)
        return _Snapshot(step=step, sums=sums, weight=sums.new_zeros(()), scoring=self._passes.begin())

    def _score(self, source: SampleSource, snapshot: _Snapshot) -> None:
        """The pass: one group of samples after the other, each at every probe point."""
        settings = self._settings
        keys = self._keys(snapshot.step, first=settings.num_probes)
        device = self._runtime.device
        reference = reference_samples(source, subset=settings.subset, seed=settings.seed, step=snapshot.step)
        with self._passes.over(
            source, reference.samples, stages=1, state=snapshot.scoring, sums=[snapshot.sums, snapshot.weight]
        ) as stages:
            for batch, _ in stages.batches(0):
                derivatives, _ = self._probe.own_derivatives([batch], self._points, keys)  # (m, q)
                drawn = to_device(reference.of(batch.indices), device)  # (m,)
                snapshot.sums += (drawn.unsqueeze(1) * derivatives).sum(0)
                snapshot.weight += (drawn * to_device(batch.counts, device)).sum()
                snapshot.scoring.work += self._probe.work([batch], self._points, keys)
        if not all_finite([snapshot.sums]):
            raise DivergenceError(
                f"snapshot of step {snapshot.step}: the full derivatives are not finite; the update was not made"
            )
        if not settings.piecewise_constant and not snapshot.sums.any():
            raise not_reached(f"snapshot of step {snapshot.step}")
        snapshot.base = shelved(self._parameters, offload=settings.offload)
        snapshot.scoring.complete = True
