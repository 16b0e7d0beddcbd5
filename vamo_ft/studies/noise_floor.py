"""How finite differences of the loss depend on the size of the perturbation.

Shapes: n samples, q directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.types import Batch
from vamo_ft.estimators.eps_search import correlation
from vamo_ft.estimators.probes import Difference, LossProbe, probe_points

__all__ = ["EPS_GRID", "RADIUS_GRID", "ErrorCurve", "SizeError", "measure_errors"]

EPS_GRID = tuple(10 ** (exponent / 2) for exponent in range(-10, 0))
"""Per coordinate, for directions of norm sqrt(d): 1e-5 to 0.3 by half decades."""

RADIUS_GRID = tuple(10 ** (exponent / 2) for exponent in range(-8, 2))
"""For directions of norm 1: 1e-4 to 3 by half decades."""

_HARMLESS = 0.1  # relative error that is nothing beside the noise of a mini-batch


@dataclass(frozen=True, slots=True)
class SizeError:
    """Finite differences at one size, against back-propagation.

    Attributes:
        size: eps, or a radius.
        relative_error: `sqrt(sum (c - c*)^2 / sum c*^2)` over samples and directions.
        correlation: of c with c*, both centred per direction: what is left for a correction.
    """

    size: float
    relative_error: float
    correlation: float


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """Errors over a grid of sizes.

    Attributes:
        difference: central or forward.
        errors: one for each size, ascending.
        loss_noise: standard deviation of the rounding noise of one sample's loss; None where the grid does not reach
            down to it.
        recommended: the size of least error.
        usable: the smallest and the largest size around it whose errors are all within twice the least, or below 0.1.
    """

    difference: Difference
    errors: tuple[SizeError, ...]
    loss_noise: float | None
    recommended: float
    usable: tuple[float, float]

    def holds(self, size: float) -> bool:
        """Whether a size lies in the usable range."""
        return self.usable[0] <= size <= self.usable[1]


def measure_errors(
    probe: LossProbe,
    micro_batches: Sequence[Batch],
    keys: Sequence[HashKey],
    exact: Tensor,
    *,
    difference: Difference,
    sizes: Sequence[float],
) -> ErrorCurve:
    """Compares finite differences of each sample's loss with `c*_ij = <grad L_i, z_j>`.

    With a loss that carries noise of standard deviation s, independent from point to point, the squared error of a
    central difference is `s^2 / (2 eps^2) + (D eps^2 / 6)^2`, D being the third derivative along z: the U shape, least
    at `eps = (3 s / |D|)^(1/3)`. A forward difference has `2 s^2 / eps^2 + (f'' eps / 2)^2`.

    The noise is read off the falling branch, where it is all of the error: `s = sqrt(2) eps error` (central), or
    `eps error / sqrt(2)` (forward), the median over the sizes below that of least error. The difference-table method
    (More and Wild 2011, "Estimating computational noise") would tell it without derivatives; here the exact ones are at
    hand, and it is the error of this very formula that matters. A size at which no loss changes at all tells nothing
    and is left out.

    Args:
        micro_batches: the n samples.
        keys: the q directions.
        exact: (n, q) float64 c*.
        sizes: ascending.
    """
    errors, absolute, noisy = [], [], []
    for size in sizes:
        points = probe_points(difference, num_probes=len(keys), eps=size)
        estimated, _ = probe.derivatives(micro_batches, points, keys)
        error = (estimated - exact).square().mean().sqrt()
        relative = float(error / exact.square().mean().sqrt())
        errors.append(SizeError(size, relative, correlation(estimated, exact)))
        absolute.append(float(error))
        noisy.append(bool(estimated.any()))
    best = min(range(len(sizes)), key=lambda place: absolute[place])
    to_noise = 2**0.5 if difference == "central" else 0.5**0.5
    floor = [to_noise * sizes[place] * absolute[place] for place in range(best) if noisy[place]]
    bound = max(2 * errors[best].relative_error, _HARMLESS)
    low = high = best
    while low > 0 and errors[low - 1].relative_error <= bound:
        low -= 1
    while high < len(sizes) - 1 and errors[high + 1].relative_error <= bound:
        high += 1
    return ErrorCurve(
        difference=difference,
        errors=tuple(errors),
        loss_noise=median(floor) if floor else None,
        recommended=sizes[best],
        usable=(sizes[low], sizes[high]),
    )
