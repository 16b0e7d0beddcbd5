"""What the correction does to the variance of the batch gradient, as its snapshot grows old.

Shapes: M batches.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.studies.contrasts import CorrectedVariance
from vamo_ft.studies.intervals import Interval, resamples

__all__ = ["AgeRow", "VarianceSummary", "measured_ages", "period_weights", "summarise_variance"]

_OLDEST = 64  # steps on which the point is moved, at most


@dataclass(frozen=True, slots=True)
class AgeRow:
    """Variance ratios Var(v) / Var(g) for a snapshot that is `age` steps old.

    Attributes:
        age: in steps.
        alpha: the configured coefficient; for an adaptive one what the rule gives.
        configured: the ratio at that coefficient.
        one: the ratio at alpha 1.
        best: the ratio at the optimum.
        best_alpha: the optimum.
    """

    age: int
    alpha: float
    configured: Interval
    one: Interval
    best: Interval
    best_alpha: Interval


@dataclass(frozen=True, slots=True)
class VarianceSummary:
    """Ratios by age, and their means over a snapshot's life.

    Attributes:
        rows: by rising age.
        configured: mean ratio at the configured coefficient.
        best: mean ratio at the optimum of each age.
    """

    rows: tuple[AgeRow, ...]
    configured: Interval
    best: Interval


def measured_ages(period: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, ... up to the period (steps), and to 64."""
    limit = min(period, _OLDEST)
    return (0, *(2**power for power in range(limit.bit_length()) if 2**power <= limit))


def period_weights(ages: Sequence[int], period: int) -> Tensor:
    """(len(ages),) float64 weights of the measured ages in the mean over steps of age 0 to period - 1.

    Between two measured ages the ratio is taken as linear in log(age + 1); beyond the last it stays as it is there.
    """
    weights = torch.zeros(len(ages), dtype=torch.float64)
    for age in range(period):
        right = bisect_right(ages, age)
        if right == len(ages):
            weights[-1] += 1 / period
            continue
        low, high = (math.log(ages[place] + 1) for place in (right - 1, right))
        part = (math.log(age + 1) - low) / (high - low)
        weights[right - 1] += (1 - part) / period
        weights[right] += part / period
    return weights


def summarise_variance(
    measured: Mapping[int, CorrectedVariance], *, alpha: float | None, period: int, seed: int
) -> VarianceSummary:
    """Ratios with intervals.

    The same batches are drawn again at every age, so that means over ages are of one draw.

    Args:
        measured: by age, ascending.
        alpha: the configured coefficient; None adapts: as in training it is the slope on other batches, clipped to
            0 .. 1 (half of the contrasts take the slope of the other half).
        period: steps between two snapshots.
        seed: of the run.
    """
    count = len(next(iter(measured.values())).squares)
    everything, drawn = torch.arange(count), resamples(count, seed=seed)
    rows, configured, best = [], [], []
    for age, variance in measured.items():
        if alpha is None:
            coefficients = _learnt(variance, everything)
            ratios = torch.stack([variance.ratio(_learnt(variance, rows), rows) for rows in drawn])
        else:
            coefficients = torch.full((count,), alpha, dtype=torch.float64)
            ratios = variance.ratio(coefficients, drawn)
        configured.append((variance.ratio(coefficients, everything), ratios))
        best.append((variance.best_ratio(everything), variance.best_ratio(drawn)))
        one = torch.ones(count, dtype=torch.float64)
        rows.append(
            AgeRow(
                age=age,
                alpha=float(coefficients.mean()),
                configured=Interval.of(*configured[-1]),
                one=Interval.of(variance.ratio(one, everything), variance.ratio(one, drawn)),
                best=Interval.of(*best[-1]),
                best_alpha=Interval.of(variance.best_alpha(everything), variance.best_alpha(drawn)),
            )
        )
    weights = period_weights(list(measured), period)
    return VarianceSummary(tuple(rows), _mean_over(configured, weights), _mean_over(best, weights))


def _learnt(variance: CorrectedVariance, rows: Tensor) -> Tensor:
    """(M - 1,) each half's coefficient from what of the other half is among `rows`; 0 where nothing is."""
    coefficients = torch.zeros(len(variance.squares), dtype=torch.float64)
    for parity in (0, 1):
        coefficients[parity::2] = variance.best_alpha(rows[rows % 2 != parity]).clamp(0.0, 1.0)
    return coefficients


def _mean_over(ages: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> Interval:
    values, draws = zip(*ages, strict=True)
    return Interval.of(weights @ torch.stack(values), weights @ torch.stack(draws))
