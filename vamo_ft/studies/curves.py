"""Training curves of several methods, and what they say in a few numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

__all__ = ["ArmResult", "Band", "CurvePoint", "SeedRun", "Spread", "Trial", "band", "summary"]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Where a run stood after `step` updates.

    Attributes:
        step: updates done.
        forward_samples: samples of all forward passes so far, snapshots included.
        backward_samples: samples of all backward passes so far.
        seconds: of training so far.
        loss: training loss.
    """

    step: int
    forward_samples: int
    backward_samples: int
    seconds: float
    loss: float

    @property
    def evaluations(self) -> int:
        """The currency of comparison: a backward pass counts as two forward passes."""
        return self.forward_samples + 2 * self.backward_samples


@dataclass(frozen=True, slots=True)
class SeedRun:
    """One run; `failure` says why it ended early."""

    seed: int
    points: Sequence[CurvePoint]
    failure: str | None = None

    @property
    def final_loss(self) -> float:
        """Infinite where the run failed or its loss is not finite."""
        loss = self.points[-1].loss if self.failure is None else math.inf
        return loss if math.isfinite(loss) else math.inf

    def loss_within(self, evaluations: int) -> float:
        """The loss at the last point that the budget reaches; infinite where that is none, or the run failed."""
        reached = [point.loss for point in self.points if point.evaluations <= evaluations]
        return reached[-1] if reached and self.failure is None else math.inf


@dataclass(frozen=True, slots=True)
class Trial:
    """A step size that was tried, and the training loss it led to."""

    learning_rate: float
    loss: float


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One method on every seed.

    Attributes:
        label: its name.
        learning_rate: the chosen step size.
        trials: all that were tried; none where it was given.
        runs: one for each seed.
    """

    label: str
    learning_rate: float
    trials: Sequence[Trial]
    runs: Sequence[SeedRun]

    @property
    def at_edge(self) -> bool:
        """Whether the chosen step size is the smallest or largest tried, so that a better one may lie outside."""
        tried = [trial.learning_rate for trial in self.trials]
        return len(tried) > 1 and self.learning_rate in (min(tried), max(tried))


@dataclass(frozen=True, slots=True)
class Band:
    """Means over seeds at each recorded point, with the smallest and the largest value."""

    label: str
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def band(arm: ArmResult, axis: Callable[[CurvePoint], float]) -> Band:
    """The arm's loss against `axis`, as far as every seed came."""
    points = list(zip(*(run.points for run in arm.runs), strict=False))
    losses = [[point.loss for point in group] for group in points]
    return Band(
        arm.label,
        x=[mean(map(axis, group)) for group in points],
        middle=[mean(group) for group in losses],
        low=[min(group) for group in losses],
        high=[max(group) for group in losses],
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation over seeds; None where a loss is not finite (or there is one seed)."""

    mean: float | None
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value for each seed."""
        if not all(map(math.isfinite, values)):
            return cls(None, None)
        return cls(mean(values), stdev(values) if len(values) > 1 else None)


def summary(arms: Sequence[ArmResult]) -> dict[str, Any]:
    """The numbers of a comparison, as plain values.

    Losses at equal steps are those after the last step; at equal evaluations, those that each method has reached by the
    time the cheapest one is done (`budget`, forward + 2 x backward sample evaluations).
    """
    complete = [run for arm in arms for run in arm.runs if run.failure is None]
    budget = min((run.points[-1].evaluations for run in complete), default=0)
    return {
        "budget": budget,
        "methods": [
            {
                "label": arm.label,
                "learning_rate": arm.learning_rate,
                "learning_rate_at_edge": arm.at_edge,
                "equal_steps": _plain(Spread.of([run.final_loss for run in arm.runs])),
                "equal_evaluations": _plain(Spread.of([run.loss_within(budget) for run in arm.runs])),
                "evaluations": mean(run.points[-1].evaluations for run in arm.runs),
                "seconds": mean(run.points[-1].seconds for run in arm.runs),
                "failures": sum(run.failure is not None for run in arm.runs),
            }
            for arm in arms
        ],
    }


def _plain(spread: Spread) -> dict[str, float | None]:
    return {"mean": spread.mean, "deviation": spread.deviation}
