"""What the parts of a run share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vamo_ft.config.period import Period
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Progress
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.training.sinks import MetricsWriter

__all__ = ["Surroundings", "due", "run_length"]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run gets from the process it lives in.

    Attributes:
        checkpoints: folder that checkpoints are written to.
        seed_log: file that a run along directions logs its updates to.
        writer: of metrics.jsonl.
        progress: shows long passes.
        stop_requested: whether a signal came.
    """

    checkpoints: Path
    seed_log: Path
    writer: MetricsWriter
    progress: Progress
    stop_requested: Callable[[], bool]


def due(every: Period | None, source: TrainingSamples) -> Callable[[int], bool]:
    """Whether something with period `every` is due before a step; without a period it never is."""
    if every is None:
        return lambda step: False
    return lambda step: every.due(step, batch_size=source.batch_size, num_samples=source.num_samples)


def run_length(config: RunConfig, source: TrainingSamples) -> int:
    """Updates of the whole run."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, math.ceil(training.epochs * source.num_samples / training.batch_size))
