"""Resampling and permutation against enumeration."""

import math
from itertools import product
from statistics import fmean

import pytest
import torch

from vamo_ft.studies.intervals import resamples
from vamo_ft.studies.paired import holm, least_seeds, resampled_means, sign_flip_p, t_test_p, two_sided_p

VALUES = torch.tensor([[1.0, 0.0, 4.0], [2.0, 3.0, 0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def enumerated() -> list[float]:
    """The mean over seeds on each of the 2^2 x 3^3 resamples, all equally likely."""
    values, weights = VALUES.tolist(), WEIGHTS.tolist()
    return [
        fmean(sum(values[seed][i] for i in samples) / sum(weights[i] for i in samples) for seed in seeds)
        for seeds in product(range(2), repeat=2)
        for samples in product(range(3), repeat=3)
    ]


def test_resampled_means_have_the_distribution_of_all_resamples() -> None:
    every, drawn = enumerated(), resampled_means(VALUES, WEIGHTS)
    assert drawn.mean() == pytest.approx(fmean(every), abs=0.04)
    for level in (0.3, 0.5, 0.8, 1.2, 2.0):
        assert (drawn <= level).double().mean() == pytest.approx(fmean(x <= level for x in every), abs=0.05)
    assert set(drawn.mul(1e9).round().tolist()) <= {round(x * 1e9) for x in every}


def test_methods_meet_the_same_draws() -> None:
    """The better by the same on every sample is better by exactly that on every resample."""
    ones = torch.ones(3, dtype=torch.float64)
    difference = resampled_means(VALUES + 0.25, ones) - resampled_means(VALUES, ones)
    assert torch.allclose(difference, torch.full_like(difference, 0.25), atol=1e-12)
    assert two_sided_p(difference) == 2 / (len(difference) + 1)
    assert not torch.equal(resamples(3, seed=0), resamples(3, seed=1))  # samples are not drawn as seeds are


def test_the_p_value_counts_the_smaller_tail() -> None:
    draws = torch.tensor([-1.0, 0.0, 0.0, 2.0, 3.0, 4.0, 5.0])
    assert two_sided_p(draws) == 2 * (1 + 3) / 8
    assert two_sided_p(-draws) == 1.0
    assert two_sided_p(torch.zeros(9)) == 1.0


@pytest.mark.parametrize(
    "differences", [(1.0,), (1.0, 2.0, 0.5), (1.0, -2.0, 0.5, 0.5), (0.1, 0.2, 0.3, -0.1, 0.4), (0.0, 0.0)]
)
def test_the_permutation_test_enumerates_all_signs(differences: tuple[float, ...]) -> None:
    found = abs(sum(differences))
    flips = list(product((1, -1), repeat=len(differences)))
    extreme = sum(abs(sum(s * d for s, d in zip(f, differences, strict=True))) >= found - 1e-9 for f in flips)
    assert sign_flip_p(differences) == pytest.approx(extreme / len(flips))


def test_the_smallest_p_over_seeds() -> None:
    assert sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip_p([0.5] * 20) == 2 / 2**20
    for comparisons in (1, 2, 4, 7):
        needed = least_seeds(comparisons, level=0.05)
        assert comparisons * sign_flip_p([1.0] * needed) <= 0.05 < comparisons * sign_flip_p([1.0] * (needed - 1))


@pytest.mark.parametrize(
    "differences", [(1.0, 3.0), (1.0, -0.2, 0.4), (0.1, 0.2, 0.3, -0.1), (2.0, 2.1, 1.9, 2.2, 2.0)]
)
def test_the_t_test_is_the_tail_of_students_density(differences: tuple[float, ...]) -> None:
    nu = len(differences) - 1
    mean = sum(differences) / (nu + 1)
    t = abs(mean) / (sum((d - mean) ** 2 for d in differences) / nu / (nu + 1)) ** 0.5
    x = torch.linspace(0, t, 200_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / math.sqrt(nu * math.pi)
    within = 2 * scale * torch.trapezoid((1 + x**2 / nu) ** (-(nu + 1) / 2), x)
    assert t_test_p(differences) == pytest.approx(1 - float(within), abs=1e-7)


def test_the_t_test_of_equal_differences() -> None:
    assert t_test_p([0.0, 0.0, 0.0]) == 1.0
    assert t_test_p([0.5, 0.5]) == 0.5
    assert t_test_p([5 / 6 - 4 / 6, 4 / 6 - 3 / 6, 1 / 6]) == 0.25, "equal but for the last bits"
    assert t_test_p([1.0, -1.0]) == 1.0


def test_holm_multiplies_by_what_is_left() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
