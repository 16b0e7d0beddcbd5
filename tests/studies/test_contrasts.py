"""One pass over batches against dense arithmetic over all of them."""

import pytest
import torch

from tests.toys import normal
from vamo_ft.studies.contrasts import Contrasts, CorrectedVariance
from vamo_ft.studies.intervals import Interval, resamples
from vamo_ft.studies.variance import measured_ages, period_weights, summarise_variance

BATCHES, DIMENSION, PROBES = 9, 14, 3


def problem():
    """Gradients, directions and the correction's coefficients, with a large mean that must not matter."""
    gradients = normal(BATCHES, DIMENSION, seed=1) + 100 * normal(DIMENSION, seed=2)
    z = normal(PROBES, DIMENSION, seed=3)
    weights = (gradients @ z.T) @ torch.linalg.inv(z @ z.T) + 0.3 * normal(BATCHES, PROBES, seed=4)
    return gradients, z, weights


def measured() -> CorrectedVariance:
    gradients, z, weights = problem()
    contrasts = Contrasts(z @ z.T)
    for gradient, weight in zip(gradients, weights, strict=True):
        contrasts.add([gradient[:4].view(2, 2), gradient[4:]], z @ gradient, weight)
    return contrasts.result()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.0])
def test_ratios_equal_those_of_dense_corrected_gradients(alpha: float) -> None:
    gradients, z, weights = problem()
    corrected = gradients - alpha * weights @ z

    def variance(rows):
        return (rows - rows.mean(0)).square().sum()

    everything = torch.arange(BATCHES - 1)
    ratio = measured().ratio(torch.full((BATCHES - 1,), alpha, dtype=torch.float64), everything)
    assert float(ratio) == pytest.approx(float(variance(corrected) / variance(gradients)), rel=1e-9)
    assert float(measured().squares.sum()) == pytest.approx(float(variance(gradients)), rel=1e-9)
    assert float(measured().best_ratio(everything)) <= float(ratio) + 1e-12


def test_the_best_alpha_is_least() -> None:
    variance, everything = measured(), torch.arange(BATCHES - 1)
    best = variance.best_alpha(everything)
    at_best = variance.ratio(best.expand(BATCHES - 1), everything)
    assert float(at_best) == pytest.approx(float(variance.best_ratio(everything)), rel=1e-12)
    for other in (best - 0.05, best + 0.05):
        assert float(variance.ratio(other.expand(BATCHES - 1), everything)) > float(at_best)


def test_contrasts_of_independent_gradients_have_the_variance_of_the_noise() -> None:
    """Each of them, also the first, whose mean is of one gradient only."""
    contrasts = [Contrasts(torch.eye(1, dtype=torch.float64)) for _ in range(400)]
    for seed, each in enumerate(contrasts):
        for gradient in 5.0 + normal(4, 6, seed=seed):
            each.add([gradient], torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    squares = torch.stack([each.result().squares for each in contrasts])
    assert squares.mean(0).tolist() == pytest.approx([6.0] * 3, rel=0.1)
    assert float(torch.corrcoef(squares.T).triu(1).abs().max()) < 0.2


def test_intervals_hold_the_truth_nine_times_in_ten() -> None:
    held = 0
    for trial in range(200):
        values = normal(40, seed=1000 + trial).square()
        interval = Interval.of(values.mean(), values[resamples(40, seed=trial)].mean(1))
        held += interval.low <= 1.0 <= interval.high
    assert 160 <= held <= 195
    assert torch.equal(resamples(5, seed=1), resamples(5, seed=1))
    assert not torch.equal(resamples(5, seed=1), resamples(5, seed=2))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    resamples(5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_ages_double_up_to_the_period_and_weights_make_its_mean() -> None:
    assert measured_ages(1) == (0, 1)
    assert measured_ages(6) == (0, 1, 2, 4)
    assert measured_ages(10**6) == (0, 1, 2, 4, 8, 16, 32, 64)
    ages = measured_ages(8)
    weights = period_weights(ages, 8)
    assert float(weights.sum()) == pytest.approx(1)
    line = torch.tensor([age + 1.0 for age in ages], dtype=torch.float64).log()  # a course that is linear in the log
    steps = torch.arange(1, 9, dtype=torch.float64).log()
    assert float(weights @ line) == pytest.approx(float(steps.mean()), rel=1e-12)
    assert period_weights((0, 1), 4).tolist() == [0.25, 0.75]


def test_an_adaptive_coefficient_comes_from_other_contrasts() -> None:
    count = 10
    squares = torch.full((count,), 4.0, dtype=torch.float64)
    products = torch.tensor([1.0, 0.2] * 5, dtype=torch.float64)
    corrections = torch.ones(count, dtype=torch.float64)
    summary = summarise_variance({0: CorrectedVariance(squares, products, corrections)}, alpha=None, period=1, seed=0)
    # the even ones take the slope of the odd ones, 0.2, and the other way round
    expected = 1 - 5 * (2 * 0.2 * 1.0 - 0.04 + 2 * 1.0 * 0.2 - 1.0) / 40
    (row,) = summary.rows
    assert row.configured.value == pytest.approx(expected)
    assert row.alpha == pytest.approx(0.6)
    assert row.best_alpha.value == pytest.approx(0.6)
    assert summary.configured.value == pytest.approx(expected)
    negative = summarise_variance({0: CorrectedVariance(squares, -products, corrections)}, alpha=None, period=1, seed=0)
    assert negative.rows[0].alpha == 0
    assert negative.rows[0].configured.value == 1
