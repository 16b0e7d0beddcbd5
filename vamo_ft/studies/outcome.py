"""What a comparison says: medians, intervals, and which differences are more than chance.

Shapes: S seeds, n held-out samples, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.config.monitoring import LOWER_IS_BETTER
from vamo_ft.config.schema import RunConfig
from vamo_ft.studies.budget import Plan
from vamo_ft.studies.intervals import Interval
from vamo_ft.studies.paired import holm, least_seeds, resampled_means, sign_flip_p, t_test_p, two_sided_p
from vamo_ft.studies.records import RunRecord, SampleScores

__all__ = ["Contest", "MethodOutcome", "Outcome", "Trial", "compared_metric", "draw_conclusions", "rank"]

_LEVEL = 0.05

Verdict = Literal["better", "worse", "tie"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A learning rate that was tried; `value` is what it came to on the tuning half, None where it diverged."""

    learning_rate: float
    value: float | None


@dataclass(frozen=True, slots=True)
class Contest:
    """A method against the reference.

    Attributes:
        difference: of the means, this method's less the reference's, with its 95 % interval.
        bootstrap_p: of the paired bootstrap over seeds and samples.
        t_p: of the paired t-test over seeds.
        signs_p: of the exact permutation test over seeds.
        adjusted_p: the larger of the first two, adjusted for the number of methods (Holm). The bootstrap knows that
            other samples would have given another result, but takes a few seeds for all there are; the t-test is the
            other way round. A difference has to stand before both.
        verdict: better or worse where the adjusted p is below 0.05, else a tie.
    """

    difference: Interval
    bootstrap_p: float
    t_p: float
    signs_p: float
    adjusted_p: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class MethodOutcome:
    """One method.

    Attributes:
        label: its name.
        learning_rate: the chosen one.
        at_edge: whether it is the smallest or largest of several tried, so that a better one may lie outside.
        trials: all that were tried; none where there was no choice.
        steps: updates of the plan.
        values: the compared metric of each seed's final model, None where the run diverged.
        median: over seeds, where a run that diverged is the worst; None where it is such a run's.
        median_loss: likewise, of the held-out loss.
        mean: over seeds with its 95 % interval; None where a run diverged.
        diverged: runs of `values` that did.
        spent: mean over seeds, in the budget's currency.
        evaluations, flops, seconds: likewise.
        step_seconds: seconds of a step, snapshots included; None where none was made.
        peak_memory_bytes: the largest of its runs.
        contest: against the reference; None for itself, with a single seed, and where a run of either diverged.
    """

    label: str
    learning_rate: float
    at_edge: bool
    trials: Sequence[Trial]
    steps: int
    values: Sequence[float | None]
    median: float | None
    median_loss: float | None
    mean: Interval | None
    diverged: int
    spent: float
    evaluations: float
    flops: float
    seconds: float
    step_seconds: float | None
    peak_memory_bytes: int
    contest: Contest | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The whole comparison.

    Attributes:
        metric: what is compared.
        budget: of each run.
        currency: of the budget.
        seeds: of the runs that are reported.
        num_samples: held-out samples of the half that is reported.
        reference: the method that others are compared with: the file's own, where it is among them, else the first.
        least_seeds: with fewer, the permutation test over seeds alone cannot reach 0.05 for all contests together.
        methods: in the order of the file.
    """

    metric: str
    budget: float
    currency: str
    seeds: Sequence[int]
    num_samples: int
    reference: str
    least_seeds: int
    methods: Sequence[MethodOutcome]


def compared_metric(config: RunConfig) -> str:
    """`compare.metric`, or the first score of `evaluation.metrics`, or the loss."""
    assert config.compare is not None
    scores = [name for name in config.evaluation.metrics if name not in LOWER_IS_BETTER]
    return config.compare.metric or next(iter(scores), "loss")


def rank(runs: Sequence[RunRecord], metric: str) -> list[RunRecord]:
    """Runs from the best to the worst: by the metric, then the loss, then the smaller learning rate."""

    def order(run: RunRecord) -> tuple[float, float, float]:
        if run.final is None:
            return math.inf, math.inf, run.learning_rate
        return _badness(run.final[metric], metric), run.final["loss"], run.learning_rate

    return sorted(runs, key=order)


def draw_conclusions(
    config: RunConfig,
    plans: Mapping[str, Plan],
    *,
    trials: Mapping[str, Sequence[RunRecord]],
    runs: Mapping[str, Sequence[RunRecord]],
    chosen: Mapping[str, float],
    scores: Callable[[RunRecord], SampleScores],
) -> Outcome:
    """From finished runs to a verdict.

    Args:
        config: the file's own run.
        plans: label -> its length.
        trials: label -> runs on the tuning seed.
        runs: label -> runs of every seed, in the order of seeds.
        chosen: label -> learning rate.
        scores: what a run's final model makes of each sample.
    """
    assert config.compare is not None
    metric, budget = compared_metric(config), config.compare.budget
    reference = config.method.name if config.method.name in runs else next(iter(runs))
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    for label, of_method in runs.items():
        if all(run.final is not None for run in of_method):
            samples = [scores(run) for run in of_method]
            tables[label] = torch.stack([each.values[metric] for each in samples]), samples[0].weights_of(metric)
    draws = {label: resampled_means(*table) for label, table in tables.items()}
    means = {label: fmean(_value(run, metric) for run in runs[label]) for label in tables}
    comparable = reference in tables and len(config.compare.seeds) > 1  # one seed tells nothing of the next one
    rivals = [label for label in tables if label != reference and comparable]
    differences = {label: draws[label] - draws[reference] for label in rivals}
    by_seed = {
        label: [
            _value(run, metric) - _value(other, metric) for run, other in zip(runs[label], runs[reference], strict=True)
        ]
        for label in rivals
    }
    bootstrap = [two_sided_p(differences[label]) for label in rivals]
    t_test = [t_test_p(by_seed[label]) for label in rivals]
    adjusted = holm(list(map(max, bootstrap, t_test)))
    contests = {}
    for number, label in enumerate(rivals):
        found = fmean(by_seed[label])
        contests[label] = Contest(
            difference=Interval.of(torch.tensor(found, dtype=torch.float64), differences[label], share=1 - _LEVEL),
            bootstrap_p=bootstrap[number],
            t_p=t_test[number],
            signs_p=sign_flip_p(by_seed[label]),
            adjusted_p=adjusted[number],
            verdict="tie" if adjusted[number] >= _LEVEL else "better" if _badness(found, metric) < 0 else "worse",
        )
    methods = [
        _method(
            label,
            runs[label],
            rank(trials[label], metric),
            chosen[label],
            plans[label],
            metric=metric,
            mean=Interval.of(torch.tensor(means[label], dtype=torch.float64), draws[label], share=1 - _LEVEL)
            if label in tables
            else None,
            contest=contests.get(label),
        )
        for label in runs
    ]
    return Outcome(
        metric=metric,
        budget=budget.amount,
        currency=budget.currency,
        seeds=config.compare.seeds,
        num_samples=next((table[0].shape[1] for table in tables.values()), 0),
        reference=reference,
        least_seeds=least_seeds(max(1, len(runs) - 1), level=_LEVEL),
        methods=methods,
    )


def _method(
    label: str,
    runs: Sequence[RunRecord],
    trials: Sequence[RunRecord],
    learning_rate: float,
    plan: Plan,
    *,
    metric: str,
    mean: Interval | None,
    contest: Contest | None,
) -> MethodOutcome:
    tried = [run.learning_rate for run in trials]
    steps = sum(run.steps for run in runs)
    return MethodOutcome(
        label=label,
        learning_rate=learning_rate,
        at_edge=len(tried) > 1 and learning_rate in (min(tried), max(tried)),
        trials=sorted(
            (Trial(run.learning_rate, None if run.final is None else run.final[metric]) for run in trials),
            key=lambda trial: trial.learning_rate,
        ),
        steps=plan.steps,
        values=[None if run.final is None else run.final[metric] for run in runs],
        median=_median(runs, metric),
        median_loss=_median(runs, "loss"),
        mean=mean,
        diverged=sum(run.final is None for run in runs),
        spent=fmean(run.spent for run in runs),
        evaluations=fmean(run.evaluations for run in runs),
        flops=fmean(run.flops for run in runs),
        seconds=fmean(run.seconds for run in runs),
        step_seconds=sum(run.seconds for run in runs) / steps if steps else None,
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        contest=contest,
    )


def _median(runs: Sequence[RunRecord], metric: str) -> float | None:
    worst = math.inf if metric == "loss" else -math.inf
    middle = median(worst if run.final is None else run.final[metric] for run in runs)
    return middle if math.isfinite(middle) else None


def _badness(value: float, metric: str) -> float:
    """Of which less is better."""
    return value if metric == "loss" else -value


def _value(run: RunRecord, metric: str) -> float:
    assert run.final is not None
    return run.final[metric]
