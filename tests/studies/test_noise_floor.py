"""The size of least error, where the noise and the curvature are known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.toys import ExplicitDirections, normal
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Batch, LossTerms
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.studies.noise_floor import ErrorCurve, measure_errors

SIGMA, THIRD, SECOND = 1e-9, 4.0, 3.0
STEP = 10**0.25
SIZES = [1e-5 * STEP**power for power in range(21)]  # 1e-5 to 1


class NoisyCubic:
    """`f_i(x) = (a_i . x) + s_i h/2 (u . x)^2 + s_i c/6 (u . x)^3`, signs s_i, and noise hashed from x's bits."""

    def __init__(self, samples: int, *, curvature: float, third: float, sigma: float) -> None:
        self.module = nn.Module()
        self.module.x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.slopes = normal(samples, 3, seed=1)
        self.signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(samples // 2)
        self.curvature, self.third, self.sigma = curvature, third, sigma

    def terms(self, batch: Batch) -> LossTerms:
        x, rows = self.module.x, list(batch.indices)
        along = x[0]
        value = self.slopes[rows] @ x + self.signs[rows] * (self.curvature / 2 * along**2 + self.third / 6 * along**3)
        generator = torch.Generator().manual_seed(int(x.detach().view(torch.int64).sum()) % (2**61 - 1))
        noise = torch.randn(len(self.slopes), generator=generator, dtype=torch.float64)
        return LossTerms(value + self.sigma * noise[rows], batch.counts)


def measured(objective: NoisyCubic, difference: str, sizes: list[float]) -> ErrorCurve:
    samples = len(objective.slopes)
    owner = TrainableParameters(objective.module)
    directions = ExplicitDirections(owner, torch.eye(3, dtype=torch.float64)[:1])
    probe = LossProbe(objective, owner, directions, LocalRuntime())
    batch = Batch(tuple(range(samples)), {}, {}, torch.ones(samples), samples)
    exact = objective.slopes[:, :1]  # along the first axis, at x = 0
    before = owner.digest()
    curve = measure_errors(
        probe, [batch], [HashKey(0, Domain.DIRECTION, 0, 0)], exact, difference=difference, sizes=sizes
    )
    assert owner.digest() == before
    return curve


def central_error(size: float) -> float:
    return (SIGMA**2 / (2 * size**2) + (THIRD * size**2 / 6) ** 2) ** 0.5


def forward_error(size: float) -> float:
    return (2 * SIGMA**2 / size**2 + (SECOND * size / 2) ** 2) ** 0.5


@pytest.mark.parametrize(
    ("difference", "error", "curvature", "third", "best"),
    [
        ("central", central_error, 0.0, THIRD, (3 * SIGMA / THIRD) ** (1 / 3)),
        ("forward", forward_error, SECOND, 0.0, (2 * 2**0.5 * SIGMA / SECOND) ** 0.5),
    ],
)
def test_the_best_size_balances_noise_and_curvature(
    difference: str, error: Callable[[float], float], curvature: float, third: float, best: float
) -> None:
    curve = measured(NoisyCubic(200, curvature=curvature, third=third, sigma=SIGMA), difference, SIZES)
    scale = float(normal(200, 3, seed=1)[:, 0].square().mean().sqrt())
    for each in curve.errors:
        assert each.relative_error == pytest.approx(error(each.size) / scale, rel=0.3)
    assert best / STEP <= curve.recommended <= best * STEP
    assert curve.loss_noise == pytest.approx(SIGMA, rel=0.3)
    least = min(error(size) for size in SIZES)
    harmless = [size for size in SIZES if error(size) / scale <= max(2 * least / scale, 0.1)]
    assert curve.usable == (harmless[0], pytest.approx(harmless[-1], rel=STEP * 1.01))
    assert curve.holds(curve.recommended)
    assert not curve.holds(2.0)


def test_more_noise_asks_for_larger_steps_and_narrows_the_range() -> None:
    loud = measured(NoisyCubic(200, curvature=0.0, third=THIRD, sigma=1e-3), "central", SIZES)
    quiet = measured(NoisyCubic(200, curvature=0.0, third=THIRD, sigma=1e-9), "central", SIZES)
    assert loud.recommended == pytest.approx((3 * 1e-3 / THIRD) ** (1 / 3), rel=STEP - 1)
    assert loud.recommended > 50 * quiet.recommended
    assert loud.usable[0] > quiet.usable[0]
    assert loud.errors[0].correlation < 0.5 < quiet.errors[-5].correlation


def test_sizes_that_change_no_loss_tell_nothing_of_the_noise() -> None:
    class Rounded(NoisyCubic):
        def terms(self, batch: Batch) -> LossTerms:
            terms = super().terms(batch)
            kept: Tensor = terms.total.float().double() if terms.total.abs().max() > 1e-3 else 0 * terms.total
            return LossTerms(kept, terms.count)

    curve = measured(Rounded(200, curvature=0.0, third=THIRD, sigma=1e-4), "central", [1e-9, 1e-8, 1e-2, 3e-2, 0.1])
    assert curve.errors[0].relative_error == 1
    assert curve.loss_noise == pytest.approx(1e-4, rel=0.4)
    assert measured(NoisyCubic(4, curvature=0.0, third=THIRD, sigma=0.0), "central", [0.1, 0.2]).loss_noise is None
