"""Snapshots: what VAMO knows of every sample at a reference point.

Shapes: n samples of the data, b of a batch, q probes (`num_probes`), d trainable parameters.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.core.errors import DivergenceError
from vamo_ft.core.hashing import HashKey, direction_keys
from vamo_ft.core.offload import Shelf, shelved
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import placed_at
from vamo_ft.core.protocols import Directions, Objective, Runtime, SampleSource, StateDict
from vamo_ft.core.transfer import to_device
from vamo_ft.core.types import Batch, Work
from vamo_ft.estimators.eps_search import EpsSearch
from vamo_ft.estimators.passes import PassState, Reference, SnapshotPasses, reference_samples
from vamo_ft.estimators.probes import Difference, LossProbe, ProbePoint, not_reached, probe_points
from vamo_ft.estimators.table import DerivativeTable

__all__ = ["Snapshot", "SnapshotSettings", "Snapshots", "pseudo_inverse"]

_log = logging.getLogger("vamo_ft")

_SEARCH_SAMPLES, _SEARCH_DIRECTIONS = 8, 2
_GRAM_CUTOFF = 1e-6


@dataclass(frozen=True, slots=True)
class SnapshotSettings:
    """How snapshots are taken.

    Attributes:
        num_probes: q.
        eps: size of the perturbation along a direction; None searches for it at the first snapshot.
        candidates: sizes that the search tries.
        size_name: what the size is called in the configuration, for what is said of it.
        difference: central or forward.
        subset: M, samples whose mean stands for the mean over all; None takes all.
        horizon: with `subset`, steps that the snapshot serves, whose samples are scored too.
        source: table (keep per-sample derivatives) or recompute (keep the snapshot's parameters).
        orthogonalise: project on the span of the directions; False sums over unit directions.
        normaliser: data or batch, see `DerivativeTable`.
        seed: the run's seed; directions are keyed by (seed, snapshot step, probe).
        offload: keep the snapshot's parameters in host memory.
    """

    num_probes: int
    eps: float | None
    candidates: tuple[float, ...]
    difference: Difference
    subset: int | None
    horizon: int
    source: Literal["table", "recompute"]
    orthogonalise: bool
    normaliser: Literal["data", "batch"]
    seed: int
    offload: bool = False
    size_name: Literal["eps", "radius"] = "eps"


@dataclass(slots=True)
class Snapshot:
    """One reference point, complete or still in its pass.

    Attributes:
        step: the step before which it is taken.
        table: the samples' derivatives.
        scoring: how far the pass is.
        gram: (q, q) G, once it is complete.
        inverse_gram: (q, q) G^-1, or its pseudo-inverse.
        base: the parameters, for `source: recompute`.
    """

    step: int
    table: DerivativeTable
    scoring: PassState
    gram: Tensor | None = None
    inverse_gram: Tensor | None = None
    base: Shelf | None = None


class Snapshots:
    """Takes snapshots, and tells the noise of a batch along their directions."""

    def __init__(
        self,
        objective: Objective,
        parameters: TrainableParameters,
        directions: Directions,
        runtime: Runtime,
        *,
        settings: SnapshotSettings,
        passes: SnapshotPasses,
    ) -> None:
        if settings.num_probes > directions.numel:
            raise ValueError(f"{settings.num_probes} probes exceed the {directions.numel} trainable parameters")
        self._parameters = parameters
        self._directions = directions
        self._runtime = runtime
        self._settings = settings
        self._passes = passes
        self._probe = LossProbe(objective, parameters, directions, runtime)
        self._search = EpsSearch(
            objective, parameters, directions, runtime, self._probe, settings.difference, settings.candidates
        )
        self.eps = settings.eps
        self.eps_correlation: float | None = None

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by the main process's, unless processes hold parts of it; collective."""
        if not self._parameters.sharded:
            self._runtime.from_main_(tensors)

    def begin(self, source: SampleSource, step: int) -> Snapshot:
        """A snapshot at the present parameters, of which nothing is scored yet."""
        settings = self._settings
        base = shelved(self._parameters, offload=settings.offload) if settings.source == "recompute" else None
        table = self._empty_table(source.num_samples)
        return Snapshot(step=step, table=table, scoring=self._passes.begin(), base=base)

    def complete(self, source: SampleSource, snapshot: Snapshot) -> None:
        """The pass, or what is left of it: every group of samples at every probe point, the point changing slowest.

        Raises:
            StopRequested: between two batches; the snapshot holds what was scored so far.
            DivergenceError: a loss is not finite.
            VamoFtError: the losses do not depend on the perturbation.
        """
        if self.eps is None:
            snapshot.scoring.work += self._search_eps(source, snapshot)
        points, keys = self._points(), self.keys(snapshot)
        scored, reference = self.samples(source, snapshot)
        table = snapshot.table
        with self._passes.over(
            source, scored, stages=len(points), state=snapshot.scoring, sums=table.sums, marks=table.marks
        ) as stages:
            for number, point in enumerate(points):
                if stages.is_done(number):
                    continue
                with self._probe.at(point, keys):
                    for batch, counts in stages.batches(number):
                        losses = self._probe.losses(batch)
                        if counts:
                            table.add(batch.indices, point, losses, batch.counts)
                            snapshot.scoring.work += Work.forward([batch])
        table.close(reference.samples, frequencies=reference.frequencies)
        if samples := table.not_finite():
            raise DivergenceError(
                f"snapshot of step {snapshot.step}: the losses of {len(samples)} of {len(scored)} samples are not "
                "finite; the update was not made",
                samples=samples,
            )
        if not table.mean.any():
            raise not_reached(f"snapshot of step {snapshot.step}", setting=self._settings.size_name)
        self._form_gram(snapshot)
        snapshot.scoring.complete = True

    def noise(self, snapshot: Snapshot, micro_batches: Sequence[Batch]) -> tuple[Tensor, Work]:
        """(q,) float64, `b`: what the snapshot says of the batch's noise along its directions (see `DerivativeTable`).

        With `source: recompute` the batch is evaluated at the snapshot's parameters.
        """
        normaliser = self._settings.normaliser
        if snapshot.base is None:
            indices = [index for batch in micro_batches for index in batch.indices]
            return snapshot.table.batch_noise(indices, normaliser=normaliser), Work()
        points, keys = self._points(), self.keys(snapshot)
        with placed_at(self._parameters, snapshot.base):
            derivatives, _ = self._probe.derivatives(micro_batches, points, keys)
        counts = to_device(torch.cat([batch.counts for batch in micro_batches]), self._runtime.device)
        noise = snapshot.table.noise(derivatives, counts, normaliser=normaliser)
        return noise, self._probe.work(micro_batches, points, keys)

    def weights(self, snapshot: Snapshot, noise: Tensor) -> Tensor:
        """(q,) `w = G^-1 b`, or `b_j / G_jj` without orthogonalisation: coefficients of the directions."""
        assert snapshot.gram is not None and snapshot.inverse_gram is not None
        return snapshot.inverse_gram @ noise if self._settings.orthogonalise else noise / snapshot.gram.diagonal()

    def forward_samples(self, source: SampleSource) -> int:
        """Forward passes of one sample that the next snapshot takes, at most."""
        settings = self._settings
        scored = source.num_samples
        if settings.subset is not None:
            scored = min(scored, settings.subset + settings.horizon * source.batch_size)
        return scored * len(probe_points(settings.difference, num_probes=settings.num_probes, eps=1.0))

    def keys(self, snapshot: Snapshot) -> tuple[HashKey, ...]:
        """The q directions."""
        return direction_keys(self._settings.seed, snapshot.step, self._settings.num_probes)

    def samples(self, source: SampleSource, snapshot: Snapshot) -> tuple[list[int], Reference]:
        """The samples to score, and those among them whose mean stands for the full data."""
        settings = self._settings
        reference = reference_samples(source, subset=settings.subset, seed=settings.seed, step=snapshot.step)
        samples = reference.samples
        if len(samples) == source.num_samples or snapshot.base is not None:  # recompute: only the mean is needed
            return samples, reference
        scored = set(samples)
        for step in range(snapshot.step, snapshot.step + settings.horizon):
            scored.update(source.step_indices(step))
        return sorted(scored), reference

    def state_dict(self, snapshot: Snapshot | None) -> StateDict:
        """The chosen eps and a snapshot, also one whose pass is unfinished."""
        state: StateDict = {"eps": self.eps, "eps_correlation": self.eps_correlation, "snapshot": None}
        if snapshot is not None:
            state["snapshot"] = {
                "step": snapshot.step,
                "table": snapshot.table.state_dict(),
                "scoring": snapshot.scoring.state_dict(),
                "base": None if snapshot.base is None else self._parameters.saved_all(snapshot.base.state()),
            }
        return state

    def restored(self, state: StateDict) -> Snapshot | None:
        """Restores `state_dict`; directions and their Gram matrix are made anew from the keys."""
        self.eps, self.eps_correlation = state["eps"], state["eps_correlation"]
        saved = state["snapshot"]
        if saved is None or (scoring := self._passes.restored(saved["scoring"])) is None:
            return None
        base, own, device = saved["base"], self._parameters.own_all, self._runtime.device
        snapshot = Snapshot(
            step=saved["step"],
            table=self._empty_table(0),
            scoring=scoring,
            base=None if base is None else Shelf(own(base), device=device, offload=self._settings.offload),
        )
        snapshot.table.load_state_dict(saved["table"])
        if scoring.complete:
            self._form_gram(snapshot)
        return snapshot

    def _points(self) -> tuple[ProbePoint, ...]:
        assert self.eps is not None
        return probe_points(self._settings.difference, num_probes=self._settings.num_probes, eps=self.eps)

    def _empty_table(self, num_samples: int) -> DerivativeTable:
        dtype = torch.promote_types(self._parameters.tensors[0].dtype, torch.float32)
        return DerivativeTable(
            num_samples, num_probes=self._settings.num_probes, dtype=dtype, device=self._runtime.device
        )

    def _search_eps(self, source: SampleSource, snapshot: Snapshot) -> Work:
        indices: dict[int, None] = {}
        for step in range(snapshot.step, snapshot.step + _SEARCH_SAMPLES):
            indices |= dict.fromkeys(source.step_indices(step))
        chosen = list(indices)[:_SEARCH_SAMPLES]
        keys = self.keys(snapshot)[:_SEARCH_DIRECTIONS]
        choice = self._search.run([source.batch([index]) for index in chosen], source.batch(chosen), keys)
        self.eps, self.eps_correlation = choice.eps, choice.correlation
        name = self._settings.size_name
        _log.info("%s: auto chose %g; correlation with back-propagation %.3f", name, choice.eps, choice.correlation)
        if choice.correlation < 0.5:
            _log.warning(
                "the finite differences tell little of the samples (correlation %.2f at the best %s, %g): the "
                "correction will not help; float32 weights, difference: central or no autocast may",
                choice.correlation,
                name,
                choice.eps,
            )
        return choice.work

    def _form_gram(self, snapshot: Snapshot) -> None:
        snapshot.gram = self._directions.gram(self.keys(snapshot))
        snapshot.inverse_gram = pseudo_inverse(snapshot.gram)


def pseudo_inverse(gram: Tensor) -> Tensor:
    """(q, q) float64 `G^+`, without the directions that others span to rounding."""
    inverse: Tensor = torch.linalg.pinv(gram, rtol=_GRAM_CUTOFF, hermitian=True)
    return inverse
