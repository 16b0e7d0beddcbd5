"""What the parts of a run share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vamo_ft.config.period import Period
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Progress, SampleSource
from vamo_ft.training.sinks import Metrics

__all__ = ["RunSurroundings", "Surroundings", "checkpoint_may_be_due", "due", "run_length", "training_line_due"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What passes over data get from the process they live in.

    Attributes:
        progress: shows long passes.
        stop_requested: whether a signal came.
        use_cache: keep tokens, and take them from where they were kept.
    """

    progress: Progress
    stop_requested: Callable[[], bool]
    use_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSurroundings(Surroundings):
    """What a run gets besides.

    Attributes:
        checkpoints: folder that checkpoints are written to.
        seed_log: file that a run along directions logs its updates to.
        writer: of metrics.jsonl.
        check_held: raises where another process has taken the run over.
    """

    checkpoints: Path
    seed_log: Path
    writer: Metrics
    check_held: Callable[[], None] = lambda: None


def due(every: Period | None, source: SampleSource) -> Callable[[int], bool]:
    """Whether something with period `every` is due before a step; without a period it never is."""
    if every is None:
        return lambda step: False
    return lambda step: every.due(step, batch_size=source.batch_size, num_samples=source.samples_per_epoch)


def training_line_due(config: RunConfig, source: SampleSource) -> Callable[[int], bool]:
    """Whether a training line is: every period, and before an evaluation with which the run may end early."""
    logged, evaluated = due(config.logging.every, source), due(config.evaluation.every, source)
    may_end = config.evaluation.early_stopping_patience is not None
    return lambda step: logged(step) or (may_end and evaluated(step))


def checkpoint_may_be_due(config: RunConfig, source: SampleSource) -> Callable[[int], bool]:
    """Whether a checkpoint is: every period, and with every evaluation that may turn out the best."""
    saved, evaluated = due(config.checkpoint.every, source), due(config.evaluation.every, source)
    may_be_best = config.evaluation.ranked_by is not None
    return lambda step: saved(step) or (may_be_best and evaluated(step))


def run_length(config: RunConfig, source: SampleSource) -> int:
    """Updates of the whole run."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, math.ceil(training.epochs * source.samples_per_epoch / training.batch_size))
