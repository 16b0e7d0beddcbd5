"""A configured method on its model and data, laid open for measurements."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from vamo_ft.assemble.method import build_estimator, build_update_rule
from vamo_ft.assemble.micro_batch import micro_batch_size
from vamo_ft.assemble.parts import build_parts
from vamo_ft.assemble.run import learning_rates
from vamo_ft.assemble.surroundings import Surroundings
from vamo_ft.config.method import OPTIMIZERS, FirstOrderConfig, SpsaConfig, VamoConfig
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.micro_batches import micro_batches_of
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, GradientEstimator, Objective, Progress, Runtime, SampleSource, UpdateRule
from vamo_ft.core.types import Batch, Work
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import Difference, probe_points
from vamo_ft.estimators.vamo import Vamo

__all__ = ["SnapshotPlan", "Subject", "build_subject"]


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """How often snapshots are taken, and over how many samples.

    Attributes:
        epochs: R, between two of them; where their refresh is adaptive, as close together as the budget allows, as it
            is on a model for which old ones tell nothing.
        steps: the same in steps.
        samples: that one of them scores.
    """

    epochs: float
    steps: int
    samples: int


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    Attributes:
        first_order: the run's mini-batch gradient.
        training: moves the point, as the run would (a VAMO run without its correction).
        num_probes: q.
        eps: size of a perturbation; None: VAMO searches for it.
        sized_by_radius: whether that is a distance along unit directions, and not a size per coordinate.
        probes_per_step: whether every step evaluates probe points, and not a snapshot alone.
        vamo: whose correction is measured, and `snapshots` when it is taken anew; None for other methods.
        alpha: its coefficient; None adapts.
        plain_method: value of `method.name` for the same optimizer on back-propagation alone.
        flops: what work costs.
    """

    objective: Objective
    parameters: TrainableParameters
    directions: Directions
    runtime: Runtime
    source: SampleSource
    first_order: FirstOrder
    training: GradientEstimator
    update_rule: UpdateRule
    learning_rate: Callable[[int], float]
    micro_batch_size: int
    num_probes: int
    eps: float | None
    sized_by_radius: bool
    difference: Difference
    vamo: Vamo | None
    snapshots: SnapshotPlan | None
    alpha: float | None
    plain_method: str
    flops: Callable[[Work], int]
    seed: int
    progress: Progress

    def micro_batches(self, indices: Sequence[int]) -> list[Batch]:
        """The samples in batches of the run's size of a pass."""
        return micro_batches_of(self.source, indices, self.micro_batch_size)


def build_subject(config: RunConfig, progress: Progress, *, use_cache: bool = True) -> Subject:
    """Loads model and data, and builds the method. A snapshot takes every sample of the source that it is given.

    Args:
        use_cache: keep tokens, and take them from where they were kept.

    Raises:
        UsageError: there is nothing to measure on this method.
        DataError: model or data are not what the configuration says.
    """
    method = config.method
    if not isinstance(method, SpsaConfig | VamoConfig):
        raise UsageError(
            f"method.name: {method.name} is not diagnosed, only vamo, spsa and the presets of spsa; try --set "
            "'method={name: vamo}' to see what a correction would give, or --set 'method={name: mezo}'"
        )
    if isinstance(config.objective, MetricObjectiveConfig):
        raise UsageError("objective.type: metric has no gradient to compare with; try --set 'objective={type: loss}'")
    if config.training.stream_layers:
        raise UsageError(
            "training.stream_layers: back-propagation, which losses are compared with, needs all layers at once; try "
            "--set training.stream_layers=false"
        )
    parts = build_parts(config, weights=None, use_cache=use_cache)
    assert parts.directions is not None
    surroundings = Surroundings(progress=progress, stop_requested=lambda: False)
    estimator = build_estimator(
        _scoring_all(config),
        parts.objective,
        parts.parameters,
        parts.directions,
        parts.runtime,
        parts.source,
        surroundings,
    )
    vamo = estimator if isinstance(estimator, Vamo) else None
    first_order = FirstOrder(parts.objective, parts.parameters, parts.runtime, seed=config.run.seed)
    radius = method.structure == "gradient_subspace"
    size = method.radius if isinstance(method, VamoConfig) and radius else method.eps
    return Subject(
        objective=parts.objective,
        parameters=parts.parameters,
        directions=parts.directions,
        runtime=parts.runtime,
        source=parts.source,
        first_order=first_order,
        training=estimator if vamo is None else first_order,
        update_rule=build_update_rule(config, parts.parameters, parts.directions),
        learning_rate=learning_rates(config, parts.source),
        micro_batch_size=micro_batch_size(
            config, parts.objective, parts.parameters, parts.directions, parts.runtime, parts.source, chosen=None
        ),
        num_probes=method.probes,
        eps=size if isinstance(size, float) else None,
        sized_by_radius=radius,
        difference=method.difference,
        vamo=vamo,
        snapshots=_snapshot_plan(method, parts.source) if isinstance(method, VamoConfig) else None,
        alpha=method.alpha if isinstance(method, VamoConfig) and isinstance(method.alpha, float) else None,
        plain_method=_plain_method(config.optimizer.name),
        flops=parts.ledger.flops,
        seed=config.run.seed,
        progress=progress,
    )


def _scoring_all(config: RunConfig) -> RunConfig:
    """The configuration with snapshots over everything: what they are taken of is chosen by the measurement."""
    if not isinstance(config.method, VamoConfig):
        return config
    snapshot = config.method.snapshot.model_copy(update={"set": "all"})
    return config.model_copy(update={"method": config.method.model_copy(update={"snapshot": snapshot})})


def _snapshot_plan(method: VamoConfig, source: TrainingSamples) -> SnapshotPlan:
    every, drawn, size = method.snapshot.every, source.samples_per_epoch, source.batch_size
    epochs = float(every.count) if every.unit == "epoch" else every.count * size / drawn
    steps = every.count if every.unit == "step" else math.ceil(every.count * drawn / size)
    scored = source.num_samples
    if method.snapshot.subset is not None:
        ahead = 0 if method.source == "recompute" else steps * size
        scored = min(source.num_samples, method.snapshot.subset + ahead)
    if method.snapshot.refresh == "adaptive":
        points = len(probe_points(method.difference, num_probes=method.probes, eps=1.0))
        epochs = max(epochs, points * scored / (method.snapshot.budget * drawn))
        steps = max(steps, math.ceil(epochs * drawn / size))
    return SnapshotPlan(epochs, steps, scored)


def _plain_method(optimizer: str) -> str:
    names: tuple[str, ...] = get_args(FirstOrderConfig.model_fields["name"].annotation)
    return next((name for name in names if OPTIMIZERS.get(name) == optimizer), "first_order")
