"""What the parts of a run share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vamo_ft.config.period import Period
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Progress, SampleSource
from vamo_ft.training.sinks import MetricsWriter

__all__ = ["RunSurroundings", "Surroundings", "due", "run_length"]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What passes over data get from the process they live in.

    Attributes:
        progress: shows long passes.
        stop_requested: whether a signal came.
    """

    progress: Progress
    stop_requested: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class RunSurroundings(Surroundings):
    """What a run gets besides.

    Attributes:
        checkpoints: folder that checkpoints are written to.
        seed_log: file that a run along directions logs its updates to.
        writer: of metrics.jsonl.
        check_held: raises where another process has taken the run over.
        use_cache: keep tokens, and take them from where they were kept.
    """

    checkpoints: Path
    seed_log: Path
    writer: MetricsWriter
    check_held: Callable[[], None] = lambda: None
    use_cache: bool = True


def due(every: Period | None, source: SampleSource) -> Callable[[int], bool]:
    """Whether something with period `every` is due before a step; without a period it never is."""
    if every is None:
        return lambda step: False
    return lambda step: every.due(step, batch_size=source.batch_size, num_samples=source.samples_per_epoch)


def run_length(config: RunConfig, source: SampleSource) -> int:
    """Updates of the whole run."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, math.ceil(training.epochs * source.samples_per_epoch / training.batch_size))
