"""VAMO: mini-batch gradients with a zeroth-order variance correction from a snapshot.

Shapes: n samples of the data, b of a batch, q probes (`num_probes`), d trainable parameters.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.core.errors import VamoFtError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import placed_at
from vamo_ft.core.protocols import Directions, Objective, Runtime, SampleSource, StateDict
from vamo_ft.core.types import Batch, Estimate, Work
from vamo_ft.estimators.eps_search import EpsSearch
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.passes import PassState, SnapshotPasses, reference_samples
from vamo_ft.estimators.probes import Difference, LossProbe, ProbePoint, probe_points, probe_work
from vamo_ft.estimators.table import DerivativeTable

__all__ = ["Vamo", "VamoSettings"]

_log = logging.getLogger("vamo_ft")

_SEARCH_SAMPLES, _SEARCH_DIRECTIONS = 8, 2
_GRAM_CUTOFF = 1e-6


@dataclass(frozen=True, slots=True)
class VamoSettings:
    """The knobs of the method.

    Attributes:
        num_probes: q.
        eps: perturbation per coordinate; None searches for it at the first snapshot.
        alpha: coefficient of the projected correction.
        difference: central or forward.
        snapshot_due: whether a new snapshot is due before a step (never asked for step 0).
        subset: M, samples whose mean stands for the mean over all; None takes all.
        horizon: with `subset`, steps that the snapshot serves, whose samples are scored too.
        source: table (keep per-sample derivatives) or recompute (keep the snapshot's parameters).
        orthogonalise: project on the span of the directions; False sums over unit directions.
        normaliser: data or batch, see `DerivativeTable`.
        seed: the run's seed; directions are keyed by (seed, snapshot step, probe).
    """

    num_probes: int
    eps: float | None
    alpha: float
    difference: Difference
    snapshot_due: Callable[[int], bool]
    subset: int | None
    horizon: int
    source: Literal["table", "recompute"]
    orthogonalise: bool
    normaliser: Literal["data", "batch"]
    seed: int


@dataclass(slots=True)
class _Snapshot:
    """One reference point, complete or still in its pass."""

    step: int
    table: DerivativeTable
    scoring: PassState
    weights: Tensor | None = None  # (q, q) maps the batch noise b to the coefficients of the correction
    base: tuple[Tensor, ...] | None = None  # the parameters, for source: recompute


class Vamo:
    """`v = grad f_I(x) - alpha sum_j w_j z_j` with `w = G^-1 b`, `G_jk = <z_j, z_k>`.

    `b` is what the snapshot xs says of batch I's noise along the q shared directions z_j (see `DerivativeTable`): the
    batch's zeroth-order derivatives less the full data's. The correction is the orthogonal projection of that noise on
    span(z), so it is free of the scale of z, and its mean over batches is zero: `E[v] = E[grad f_I]` for any alpha.
    For q << d it is the paper's formula with coefficient `alpha q / d`. `orthogonalise=False` gives
    `w_j = b_j / G_jj`, the sum over unit directions.

    The paper's radius mu along unit directions is `eps sqrt(d)` here.

    Source: Chen and Ma 2025, "VAMO", arXiv 2505.13954; the projection and the table are this project's.
    """

    def __init__(
        self,
        first_order: FirstOrder,
        objective: Objective,
        parameters: TrainableParameters,
        directions: Directions,
        runtime: Runtime,
        *,
        settings: VamoSettings,
        passes: SnapshotPasses,
    ) -> None:
        if settings.num_probes > directions.numel:
            raise ValueError(f"{settings.num_probes} probes exceed the {directions.numel} trainable parameters")
        self._first_order = first_order
        self._parameters = parameters
        self._directions = directions
        self._runtime = runtime
        self._settings = settings
        self._passes = passes
        self._probe = LossProbe(objective, parameters, directions, runtime)
        self._search = EpsSearch(objective, parameters, directions, runtime, self._probe, settings.difference)
        self._eps = settings.eps
        self._correlation: float | None = None
        self._snapshot: _Snapshot | None = None

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Takes a snapshot when one is due, or goes on with one that was interrupted.

        Raises:
            StopRequested: between two batches of the pass; the state holds what was scored so far.
        """
        snapshot = self._snapshot
        if snapshot is None or (snapshot.step < step and self._settings.snapshot_due(step)):
            snapshot = self._snapshot = self._begin(source, step)
        if snapshot.scoring.complete:
            return Work()
        if self._eps is None:
            snapshot.scoring.work += self._search_eps(source, snapshot)
        self._score(source, snapshot)
        return snapshot.scoring.work

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """The mini-batch gradient, then the correction from the table (or from forward passes at the snapshot)."""
        snapshot = self._snapshot
        assert snapshot is not None and snapshot.weights is not None, "prepare comes first"
        settings, keys = self._settings, self._keys(snapshot)
        first_order = self._first_order.estimate(micro_batches, step)
        noise, work = self._batch_noise(snapshot, micro_batches)
        coefficients = settings.alpha * (snapshot.weights @ noise)  # (q,)
        if settings.alpha != 0:
            self._directions.axpy_(self._parameters.gradients(), -coefficients, keys)
        metrics: dict[str, Tensor | float] = {
            "alpha": settings.alpha,
            "paper_alpha": settings.alpha * settings.num_probes / self._directions.numel,
            "correction_coefficient": coefficients.abs().mean(),
            "snapshot_age": float(step - snapshot.step),
            "eps": self._chosen_eps,
        }
        if self._correlation is not None:
            metrics["eps_correlation"] = self._correlation
        return Estimate(loss=first_order.loss, work=first_order.work + work, metrics=metrics)

    def state_dict(self) -> StateDict:
        """The chosen eps and the snapshot, also one whose pass is unfinished."""
        state: StateDict = {"eps": self._eps, "correlation": self._correlation, "snapshot": None}
        if (snapshot := self._snapshot) is not None:
            state["snapshot"] = {
                "step": snapshot.step,
                "table": snapshot.table.state_dict(),
                "scoring": snapshot.scoring.state_dict(),
                "base": None if snapshot.base is None else list(snapshot.base),
            }
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`; directions and their Gram matrix are made anew from the keys."""
        self._eps, self._correlation, self._snapshot = state["eps"], state["correlation"], None
        saved = state["snapshot"]
        if saved is not None and (scoring := self._passes.restored(saved["scoring"])) is not None:
            base = saved["base"]
            snapshot = _Snapshot(
                step=saved["step"],
                table=self._empty_table(0),
                scoring=scoring,
                base=None if base is None else tuple(tensor.to(self._runtime.device) for tensor in base),
            )
            snapshot.table.load_state_dict(saved["table"])
            if scoring.complete:
                snapshot.weights = self._noise_weights(snapshot)
            self._snapshot = snapshot

    @property
    def _chosen_eps(self) -> float:
        assert self._eps is not None
        return self._eps

    def _keys(self, snapshot: _Snapshot) -> tuple[HashKey, ...]:
        seed, count = self._settings.seed, self._settings.num_probes
        return tuple(HashKey(seed, Domain.DIRECTION, snapshot.step, probe) for probe in range(count))

    def _points(self) -> tuple[ProbePoint, ...]:
        settings = self._settings
        return probe_points(settings.difference, num_probes=settings.num_probes, eps=self._chosen_eps)

    def _empty_table(self, num_samples: int) -> DerivativeTable:
        dtype = torch.promote_types(self._parameters.tensors[0].dtype, torch.float32)
        return DerivativeTable(
            num_samples, num_probes=self._settings.num_probes, dtype=dtype, device=self._runtime.device
        )

    def _begin(self, source: SampleSource, step: int) -> _Snapshot:
        base = self._parameters.copy() if self._settings.source == "recompute" else None
        table = self._empty_table(source.num_samples)
        return _Snapshot(step=step, table=table, scoring=self._passes.begin(), base=base)

    def _search_eps(self, source: SampleSource, snapshot: _Snapshot) -> Work:
        indices: dict[int, None] = {}
        for step in range(snapshot.step, snapshot.step + _SEARCH_SAMPLES):
            indices |= dict.fromkeys(source.step_indices(step))
        chosen = list(indices)[:_SEARCH_SAMPLES]
        keys = self._keys(snapshot)[:_SEARCH_DIRECTIONS]
        choice = self._search.run([source.batch([index]) for index in chosen], source.batch(chosen), keys)
        self._eps, self._correlation = choice.eps, choice.correlation
        _log.info("eps: auto chose %g; correlation with back-propagation %.3f", choice.eps, choice.correlation)
        if choice.correlation < 0.5:
            _log.warning(
                "the finite differences tell little of the samples (correlation %.2f at the best eps, %g): the "
                "correction will not help; float32 weights, difference: central or no autocast may",
                choice.correlation,
                choice.eps,
            )
        return choice.work

    def _samples(self, source: SampleSource, snapshot: _Snapshot) -> tuple[list[int], list[int]]:
        """The samples to score, and those among them whose mean stands for the full data."""
        settings = self._settings
        reference = reference_samples(
            source.num_samples, subset=settings.subset, seed=settings.seed, step=snapshot.step
        )
        if len(reference) == source.num_samples or snapshot.base is not None:  # recompute: only the mean is needed
            return reference, reference
        scored = set(reference)
        for step in range(snapshot.step, snapshot.step + settings.horizon):
            scored.update(source.step_indices(step))
        return sorted(scored), reference

    def _score(self, source: SampleSource, snapshot: _Snapshot) -> None:
        """The pass: every group of samples at every probe point, the point changing slowest."""
        points, keys = self._points(), self._keys(snapshot)
        scored, reference = self._samples(source, snapshot)
        with self._passes.over(source, scored, stages=len(points), state=snapshot.scoring) as stages:
            for number, point in enumerate(points):
                if stages.is_done(number):
                    continue
                with self._probe.at(point, keys):
                    for batch in stages.batches(number):
                        snapshot.table.add(batch.indices, point, self._probe.losses(batch), batch.counts)
                        snapshot.scoring.work += Work(forward_samples=len(batch), forward_tokens=batch.num_tokens)
        snapshot.table.close(reference)
        if not snapshot.table.mean.any():
            raise VamoFtError(
                f"snapshot of step {snapshot.step}: the losses are the same at all probe points; the perturbation does "
                "not reach the model (method.eps too small for the precision, or frozen parameters)"
            )
        snapshot.weights = self._noise_weights(snapshot)
        snapshot.scoring.complete = True

    def _noise_weights(self, snapshot: _Snapshot) -> Tensor:
        gram = self._directions.gram(self._keys(snapshot))
        if self._settings.orthogonalise:
            inverse: Tensor = torch.linalg.pinv(gram, rtol=_GRAM_CUTOFF, hermitian=True)
            return inverse
        return torch.diag(1 / gram.diagonal())

    def _batch_noise(self, snapshot: _Snapshot, micro_batches: Sequence[Batch]) -> tuple[Tensor, Work]:
        normaliser = self._settings.normaliser
        if snapshot.base is None:
            indices = [index for batch in micro_batches for index in batch.indices]
            return snapshot.table.batch_noise(indices, normaliser=normaliser), Work()
        points = self._points()
        with placed_at(self._parameters, snapshot.base):
            derivatives, _ = self._probe.derivatives(micro_batches, points, self._keys(snapshot))
        counts = torch.cat([batch.counts for batch in micro_batches]).to(self._runtime.device)
        return snapshot.table.noise(derivatives, counts, normaliser=normaliser), probe_work(micro_batches, points)
