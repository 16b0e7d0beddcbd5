"""Methods against each other on the same seeds and the same held-out samples.

Shapes: S seeds, n samples, R resamples.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

from vamo_ft.studies.intervals import resamples

__all__ = ["holm", "least_seeds", "resampled_means", "sign_flip_p", "t_test_p", "two_sided_p"]

_SAMPLES, _SEEDS = 0, 1  # seeds of the two draws


def resampled_means(values: Tensor, weights: Tensor) -> Tensor:
    """A method's mean over seeds of `sum_i v_si / sum_i w_i`, on resamples of seeds and of samples at once.

    Seeds and samples cross: every seed's model answers the same samples. So rows and columns are resampled
    independently, each with replacement (the pigeonhole bootstrap; Owen 2007, "The pigeonhole bootstrap", Annals of
    Applied Statistics 1(2), whose variance is never below the true one in expectation). Methods of equal S and n meet
    the same draws, so that differences of two results are those of paired runs.

    Args:
        values: (S, n) float64 scores, or summed losses, of each sample.
        weights: (n,) what they are divided by in the mean: 1, or tokens.

    Returns:
        (R,) float64.
    """
    num_seeds, num_samples = values.shape
    samples = resamples(num_samples, seed=_SAMPLES)  # (R, n)
    totals = weights[samples].sum(1)  # (R,)
    means = torch.stack([row[samples].sum(1) / totals for row in values], dim=1)  # (R, S)
    return means.gather(1, resamples(num_seeds, seed=_SEEDS)).mean(1)


def two_sided_p(draws: Tensor) -> float:
    """Of (R,) resampled differences: `2 (1 + min(#{d <= 0}, #{d >= 0})) / (R + 1)`, at most 1."""
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (len(draws) + 1))


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact paired permutation test over seeds (Fisher 1935).

    The share of all 2^S choices of signs for which `|sum_s +-d_s|` is at least what was found. It is never below
    `2^(1-S)`.
    """
    sums = torch.zeros(1, dtype=torch.float64)  # (2^s,) of the first s seeds
    for difference in differences:
        sums = torch.cat([sums + difference, sums - difference])
    found = abs(sums[0])
    return float((sums.abs() >= found - 1e-12 * max(map(abs, differences))).double().mean())


def t_test_p(differences: Sequence[float]) -> float:
    """The paired t-test over seeds (Student 1908), two-sided; two seeds or more.

    `t = mean / (s / sqrt(S))` with `nu = S - 1` degrees of freedom; its distribution by the finite sums of Abramowitz
    and Stegun (1964), 26.7.3 and 26.7.4, in `theta = atan(t / sqrt(nu))`. Of differences that are all equal, as
    those of a score on few samples may be, the spread is not known to be 0: theirs is the permutation test's p.
    """
    count, deviation = len(differences), stdev(differences)
    if deviation <= 1e-12 * max(map(abs, differences)):
        return sign_flip_p(differences)
    freedom = count - 1
    theta = math.atan(abs(fmean(differences)) / deviation * math.sqrt(count / freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 + odd, freedom, 2):  # the k-th term has cos^(2 k) or, with odd nu, cos^(2 k + 1)
        total += term
        term *= cosine**2 * power / (power + 1)
    within = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - within))


def least_seeds(comparisons: int, *, level: float) -> int:
    """The fewest seeds with which the permutation test over seeds could reach `level` in so many comparisons."""
    return 1 + math.ceil(math.log2(comparisons / level))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): `max_{k <= i} (m - k + 1) p_(k)` in ascending order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
