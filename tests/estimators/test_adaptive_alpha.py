"""The adaptive coefficient against the closed-form optimum of a problem whose noise is known."""

import math

import pytest
import torch
from torch import Tensor

from tests.toys import normal
from vamo_ft.estimators.adaptive_alpha import AdaptiveAlpha

CPU = torch.device("cpu")
PROBES, PERIOD = 4, 256
IDENTITY = torch.eye(PROBES, dtype=torch.float64)


class Drifting:
    """A linear-Gaussian noise model of a snapshot that grows stale.

    Per step, the noise `b` that the snapshot reports along q orthonormal directions is standard normal, and the step's
    gradient has the derivatives `a = mean + rho(age) b + sqrt(1 - rho^2) e` there, besides noise of variance
    `outside` that no direction holds. So alpha* = rho(age), and Var(v)/Var(grad) at coefficient alpha is
    `(outside + q (1 - 2 alpha rho + alpha^2)) / (outside + q)`.
    """

    outside = 2.0

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def correlation(self, age: int) -> float:
        return math.exp(-age / 40) - 0.35 * (1 - math.exp(-age / 80))  # turns negative in the end

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        age = step % PERIOD
        rho = self.correlation(age)
        noise, rest = torch.randn(2, PROBES, generator=self.generator, dtype=torch.float64)
        mean = math.sin(step / 30) * torch.ones(PROBES, dtype=torch.float64)
        return mean + rho * noise + math.sqrt(1 - rho**2) * rest, noise

    def variance_ratio(self, alpha: float, age: int) -> float:
        removed = 2 * alpha * self.correlation(age) - alpha**2
        return 1 - PROBES * removed / (self.outside + PROBES)


def ratios(seed: int, *, steps: int, fixed: float | None = None) -> Tensor:
    """Var(v)/Var(grad f_I) of every step, exact given the step's coefficient."""
    problem, adaptive = Drifting(seed), AdaptiveAlpha(device=CPU)
    result = []
    for step in range(steps):
        age = step % PERIOD
        if age == 0:
            adaptive.refresh(math.sin(step / 30) * torch.ones(PROBES, dtype=torch.float64))
        derivatives, noise = problem.step(step)
        alpha = float(adaptive.alpha(age)) if fixed is None else fixed
        result.append(problem.variance_ratio(alpha, age))
        adaptive.observe(
            derivatives,
            noise,
            gram=IDENTITY,
            inverse_gram=IDENTITY,
            alpha=alpha,
            squared_norm=torch.tensor(1.0),
            age=age,
        )
    return torch.tensor(result)


@pytest.mark.parametrize("seed", range(5))
def test_the_variance_is_never_worse_in_the_mean_and_better_where_the_snapshot_is_fresh(seed: int) -> None:
    adaptive, fixed = ratios(seed, steps=4 * PERIOD), ratios(seed, steps=4 * PERIOD, fixed=1.0)
    late = torch.arange(4 * PERIOD) >= 100
    age = torch.arange(4 * PERIOD) % PERIOD
    problem = Drifting(0)
    optimum = torch.tensor([problem.variance_ratio(max(0.0, problem.correlation(a)), a) for a in age.tolist()])
    assert fixed[late & (age >= 200)].mean() > 1.7, "a stale snapshot at alpha 1 does harm"
    assert adaptive[late].mean() <= 1.02
    assert adaptive[late].mean() <= optimum[late].mean() + 0.04
    assert adaptive[(torch.arange(4 * PERIOD) >= PERIOD) & (age < 8)].mean() < 0.6
    assert adaptive[late & (age >= 200)].mean() <= 1.02


def test_too_few_steps_correct_nothing() -> None:
    values = ratios(0, steps=16)
    assert torch.equal(values, torch.ones(16))


def test_a_step_does_not_decide_its_own_coefficient() -> None:
    """E[v] = E[grad f_I] needs an alpha that does not depend on the step's batch."""
    adaptive = AdaptiveAlpha(device=CPU)
    adaptive.refresh(torch.zeros(PROBES, dtype=torch.float64))
    for step in range(40):
        b = normal(PROBES, seed=step)
        a = 0.5 * b + 0.5 * normal(PROBES, seed=1000 + step)
        before = adaptive.alpha(step)
        adaptive.observe(
            a, b, gram=IDENTITY, inverse_gram=IDENTITY, alpha=before, squared_norm=torch.tensor(1.0), age=step
        )
        assert torch.equal(adaptive.alpha(step), before) == (step < 15)  # what it decides are later ones


def test_the_slope_is_that_of_least_squares_in_the_directions_own_metric() -> None:
    """Directions that are not orthogonal: the coefficient is the one that minimises |noise - alpha P b| in the mean."""
    basis = normal(PROBES, 12, seed=3)
    gram = basis @ basis.T
    inverse = torch.linalg.inv(gram)
    adaptive = AdaptiveAlpha(device=CPU)
    adaptive.refresh(torch.zeros(PROBES, dtype=torch.float64))
    numerator = denominator = 0.0
    mean = torch.zeros(PROBES, dtype=torch.float64)
    for step in range(60):
        gradient, reported = normal(12, seed=step), 0.5 * normal(12, seed=step) + normal(12, seed=1000 + step)
        a, b = basis @ gradient, basis @ reported
        correction = torch.linalg.lstsq(basis.T, reported).solution @ basis  # the projection of what is reported
        centred = torch.linalg.lstsq(basis.T, gradient).solution @ basis - torch.linalg.solve(gram, mean) @ basis
        numerator = 0.98 * numerator + 0.02 * float(centred @ correction)
        denominator = 0.98 * denominator + 0.02 * float(correction @ correction)
        adaptive.observe(
            a,
            inverse @ b,
            gram=gram,
            inverse_gram=inverse,
            alpha=0.0,
            squared_norm=torch.tensor(1.0),
            age=10**6,
        )
        mean = 0.8 * mean + 0.2 * a
    assert 0 < numerator / denominator < 1
    assert float(adaptive.alpha(10**6)) == pytest.approx(numerator / denominator, rel=1e-9)


def test_what_was_removed_is_what_the_coefficient_took_away() -> None:
    """The logged share equals the mean of |g|^2 - |g - alpha w z|^2, up to the mean m, over the mean of |g|^2."""
    adaptive = AdaptiveAlpha(device=CPU)
    adaptive.refresh(torch.zeros(PROBES, dtype=torch.float64))
    removed = norm = 0.0
    mean = torch.zeros(PROBES, dtype=torch.float64)
    for step in range(50):
        a, b, alpha = normal(PROBES, seed=step), normal(PROBES, seed=step) + 0.5 * normal(PROBES, seed=-step - 1), 0.7
        square = float(a @ a) + 3.0
        corrected = a - mean - alpha * b
        removed = 0.98 * removed + 0.02 * float((a - mean) @ (a - mean) - corrected @ corrected)
        norm = 0.98 * norm + 0.02 * square
        adaptive.observe(
            a,
            b,
            gram=IDENTITY,
            inverse_gram=IDENTITY,
            alpha=alpha,
            squared_norm=torch.tensor(square, dtype=torch.float64),
            age=step,
        )
        mean = 0.8 * mean + 0.2 * a
    assert float(adaptive.removed_share()) == pytest.approx(removed / norm, rel=1e-9)


def test_a_restored_coefficient_goes_on_as_the_first_one() -> None:
    first, second = AdaptiveAlpha(device=CPU), AdaptiveAlpha(device=CPU)
    first.refresh(torch.zeros(PROBES, dtype=torch.float64))

    def observe(adaptive: AdaptiveAlpha, step: int) -> None:
        a, b = normal(PROBES, seed=step), normal(PROBES, seed=step // 2)
        adaptive.observe(
            a,
            b,
            gram=IDENTITY,
            inverse_gram=IDENTITY,
            alpha=adaptive.alpha(step),
            squared_norm=torch.tensor(1.0),
            age=step,
        )

    for step in range(20):
        observe(first, step)
    second.load_state_dict(first.state_dict())
    for step in range(20, 60):
        observe(first, step)
        observe(second, step)
        assert torch.equal(first.alpha(step), second.alpha(step))
    assert first.recent_correlation() == second.recent_correlation()


def test_the_recent_correlation_belongs_to_the_present_snapshot() -> None:
    adaptive = AdaptiveAlpha(device=CPU)
    adaptive.refresh(torch.zeros(PROBES, dtype=torch.float64))
    for step in range(15):
        adaptive.observe(
            normal(PROBES, seed=step),
            normal(PROBES, seed=step),
            gram=IDENTITY,
            inverse_gram=IDENTITY,
            alpha=0.0,
            squared_norm=torch.tensor(1.0),
            age=step,
        )
        assert adaptive.recent_correlation() is None
    a = normal(PROBES, seed=99)
    adaptive.observe(a, a, gram=IDENTITY, inverse_gram=IDENTITY, alpha=0.0, squared_norm=torch.tensor(1.0), age=15)
    assert adaptive.recent_correlation() == pytest.approx(0.9, abs=0.1)
    adaptive.refresh(torch.zeros(PROBES, dtype=torch.float64))
    assert adaptive.recent_correlation() is None
