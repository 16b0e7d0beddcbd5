"""VAMO as published, for small models.

Shapes: n samples of the data, b of a batch, q probes (`num_probes`), d trainable parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.errors import DivergenceError, UsageError
from vamo_ft.core.hashing import Domain, HashKey, direction_keys
from vamo_ft.core.offload import Shelf, shelved, shelved_zeros
from vamo_ft.core.parameters import TrainableParameters, all_finite
from vamo_ft.core.perturbation import placed_at
from vamo_ft.core.protocols import Directions, Objective, Runtime, SampleSource, StateDict
from vamo_ft.core.types import Batch, Estimate, Work, total_count
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.passes import PassState, SnapshotPasses
from vamo_ft.estimators.probes import LossProbe, not_reached, probe_points
from vamo_ft.estimators.sharing import put_together

__all__ = ["VamoLiteral", "VamoLiteralSettings"]

_MOST_KEYS = 1 << 32  # probe numbers of a step
_TOGETHER = 16  # directions added in one pass over memory
_CORRECTION = 1 << 31  # first probe number of the bits that round a bfloat16 gradient; probe points use twice i q + j


@dataclass(frozen=True, slots=True)
class VamoLiteralSettings:
    """The knobs of the method.

    Attributes:
        num_probes: q.
        radius: mu, the distance from the snapshot to a probe point.
        alpha: coefficient of the correction; None takes the theory's, q/d.
        snapshot_due: whether a new snapshot is due before a step (never asked for step 0).
        seed: the run's seed; directions are keyed by (seed, snapshot step, i q + j).
        offload: keep the snapshot in host memory, its dense estimate once the pass is over.
    """

    num_probes: int
    radius: float
    alpha: float | None
    snapshot_due: Callable[[int], bool]
    seed: int
    offload: bool = False


@dataclass(slots=True)
class _Snapshot:
    """One reference point, complete or still in its pass."""

    step: int
    base: Shelf  # xs
    total: Shelf  # sum_i p_i ghat L_i(xs), float32 or wider; p_i: how often steps draw i, on average 1
    weight: Tensor  # () float64, sum_i p_i t_i
    scoring: PassState


class VamoLiteral:
    """`v = grad f_I(x) - alpha [ ghat_I(xs) - ghat(xs) ]`, every sample with directions of its own.

    With u_ij uniform on the unit sphere, drawn for sample i and probe j once per snapshot xs,

        ghat_i(xs) = (1/q) sum_j (d/mu) [f_i(xs + mu u_ij) - f_i(xs)] u_ij,      ghat(xs) = (1/n) sum_i ghat_i(xs)

    (two-point for q = 1, multi-point above). The correction has mean zero over batches. `ghat(xs)` and xs are held
    dense, and each step evaluates its samples at xs again: for small models. `Vamo` shares the directions and keeps
    derivatives instead, which costs neither.

    Directions z of this program have norm sqrt(d), so `u = z / sqrt(d)` and `mu = eps sqrt(d)`: then
    `ghat_i = (1/q) sum_j c_ij z_ij` with c_ij the forward difference at eps. Theory takes alpha = 1/d for q = 1; q/d
    for more is inferred from the paper's rate.

    Samples of t_i tokens: f_i is a sample's summed loss L_i in units of the mean weight Tbar, and the batch term

        (1 / (b Tbar)) sum_{i in I} [ ghat L_i - t_i sum_k p_k ghat L_k / sum_k p_k t_k ]

    is the noise of the batch's token mean, and the paper's for equal t_i. p_k is how often steps draw sample k, on
    average 1 and alike without a mixture; under that law the mean of the term is zero.
    Each sample is evaluated alone at all of its points, so that rounding cancels in the differences.

    Args:
        directions: uniform on the sphere of radius sqrt(d); their norm takes a pass over d elements per sample, probe
            and use.
        passes: over one sample at a time, for the result does not depend on how a pass is cut.

    Source: Chen and Ma 2025, "VAMO", arXiv 2505.13954; ZO-SVRG's index of the directions, Liu et al. 2018.
    """

    def __init__(
        self,
        first_order: FirstOrder,
        objective: Objective,
        parameters: TrainableParameters,
        directions: Directions,
        runtime: Runtime,
        *,
        settings: VamoLiteralSettings,
        passes: SnapshotPasses,
    ) -> None:
        dimension, probes = directions.numel, settings.num_probes
        self._first_order = first_order
        self._parameters = parameters
        self._directions = directions
        self._runtime = runtime
        self._settings = settings
        self._passes = passes
        self._probe = LossProbe(objective, parameters, directions, runtime)
        self._eps = settings.radius / math.sqrt(dimension)
        self._alpha = probes / dimension if settings.alpha is None else settings.alpha
        self._points = probe_points("forward", num_probes=probes, eps=self._eps)
        self._source: SampleSource | None = None
        self._snapshot: _Snapshot | None = None

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Takes a snapshot when one is due, or goes on with one that was interrupted.

        Raises:
            StopRequested: between two samples of the pass; the state holds what was added up so far.
            DivergenceError: a loss is not finite.
            UsageError: there are 2^32 directions or more.
        """
        if source.num_samples * self._settings.num_probes >= _MOST_KEYS:
            raise UsageError(
                f"method.probes: {self._settings.num_probes} directions for each of {source.num_samples} samples are "
                "more than a snapshot has keys for; lower it, or write method.name: vamo, which shares them"
            )
        self._source, snapshot = source, self._snapshot
        if snapshot is None or (snapshot.step < step and self._settings.snapshot_due(step)):
            snapshot = self._snapshot = self._begin(step)
        if snapshot.scoring.complete:
            return Work()
        self._score(source, snapshot)
        return snapshot.scoring.work

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """The mini-batch gradient, then the correction, from q + 1 more forward passes per sample at the snapshot."""
        source, snapshot = self._source, self._snapshot
        assert source is not None and snapshot is not None, "prepare comes first"
        first_order = self._first_order.estimate(micro_batches, step)
        samples = [source.batch([index]) for batch in micro_batches for index in batch.indices]
        work = first_order.work
        with placed_at(self._parameters, snapshot.base):
            own = [self._coefficients(snapshot, sample).unsqueeze(0) for sample in self._runtime.mine(samples)]
        width = (self._settings.num_probes,)
        coefficients = put_together(self._runtime, samples, own, width=width).flatten()  # (b q,)
        for sample in samples:
            work += self._probe.work([sample], self._points, self._keys(snapshot, sample))
        scale = self._alpha * source.num_samples / (len(samples) * snapshot.weight)  # () alpha / (b Tbar)
        gradients = self._parameters.gradients()
        keys = [key for sample in samples for key in self._keys(snapshot, sample)]
        for first in range(0, len(keys), _TOGETHER):
            part = slice(first, first + _TOGETHER)
            rounding = HashKey(self._settings.seed, Domain.ROUNDING, step, _CORRECTION + first)
            self._directions.axpy_(gradients, -scale * coefficients[part], keys[part], rounding=rounding)
        counts = total_count(samples, self._runtime.device)
        for gradient, total in zip(gradients, snapshot.total, strict=True):
            gradient += (scale * counts / snapshot.weight) * total
        return Estimate(
            loss=first_order.loss,
            work=work,
            metrics={
                "alpha": self._alpha,
                "correction_coefficient": (scale * coefficients).abs().mean(),
                "snapshot_age": float(step - snapshot.step),
                "eps": self._eps,
            },
        )

    def state_dict(self) -> StateDict:
        """The snapshot, also one whose pass is unfinished."""
        if (snapshot := self._snapshot) is None:
            return {"snapshot": None}
        return {
            "snapshot": {
                "step": snapshot.step,
                "base": snapshot.base.state(),
                "total": snapshot.total.state(),
                "weight": snapshot.weight,
                "scoring": snapshot.scoring.state_dict(),
            }
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`; directions are made anew from their keys."""
        self._snapshot, saved = None, state["snapshot"]
        if saved is not None and (scoring := self._passes.restored(saved["scoring"])) is not None:
            device, offload = self._runtime.device, self._settings.offload
            total = (tensor.clone() for tensor in saved["total"])  # the pass adds to them in place
            self._snapshot = _Snapshot(
                step=saved["step"],
                base=Shelf(saved["base"], device=device, offload=offload),
                total=Shelf(total, device=device, offload=offload and scoring.complete),
                weight=saved["weight"].to(device, copy=True),
                scoring=scoring,
            )

    def _begin(self, step: int) -> _Snapshot:
        return _Snapshot(
            step=step,
            base=shelved(self._parameters, offload=self._settings.offload),
            total=shelved_zeros(self._parameters),
            weight=torch.zeros((), dtype=torch.float64, device=self._runtime.device),
            scoring=self._passes.begin(),
        )

    def _score(self, source: SampleSource, snapshot: _Snapshot) -> None:
        """The pass: adds up `ghat L_i` and t_i over all samples."""
        with self._passes.over(
            source,
            range(source.num_samples),
            stages=1,
            state=snapshot.scoring,
            sums=[*snapshot.total, snapshot.weight],
        ) as stages:
            for sample, _ in stages.batches(0):
                drawn = source.frequency(sample.indices[0])
                coefficients = self._coefficients(snapshot, sample)
                keys = self._keys(snapshot, sample)
                self._directions.axpy_(snapshot.total, drawn * coefficients, keys)
                snapshot.weight += drawn * total_count([sample], self._runtime.device)
                snapshot.scoring.work += self._probe.work([sample], self._points, keys)
        if not all_finite(snapshot.total):
            raise DivergenceError(
                f"snapshot of step {snapshot.step}: the full estimate is not finite; the update was not made"
            )
        if not any(bool(total.any()) for total in snapshot.total):
            raise not_reached(f"snapshot of step {snapshot.step}", setting="radius")
        snapshot.total = Shelf(snapshot.total, device=self._runtime.device, offload=self._settings.offload)
        snapshot.scoring.complete = True

    def _coefficients(self, snapshot: _Snapshot, sample: Batch) -> Tensor:
        """(q,) float64, `c_ij / q`: forward differences of one sample's summed loss at the present point."""
        derivatives, _ = self._probe.own_derivatives([sample], self._points, self._keys(snapshot, sample))
        return derivatives[0] / self._settings.num_probes

    def _keys(self, snapshot: _Snapshot, sample: Batch) -> tuple[HashKey, ...]:
        (index,), probes = sample.indices, self._settings.num_probes
        return direction_keys(self._settings.seed, snapshot.step, probes, first=index * probes)
