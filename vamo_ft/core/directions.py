"""Perturbation directions by hashing, in plain torch operations.

A direction `z` has unit RMS per coordinate: `|z|` is sqrt(d), or about it. It is never stored: every operation makes
it anew, in chunks of 2**20 elements.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey, random_bits
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rounding import round_to_bfloat16

__all__ = ["Distribution", "HashedDirections"]

Distribution = Literal["rademacher", "gaussian", "sphere"]

_CHUNK = 1 << 20
_MOST_SCALES = 4096  # scalars; far more than the directions of one step or snapshot


class HashedDirections:
    """Directions over every trainable parameter (implements `core.protocols.Directions`).

    | distribution | construction |
    |---|---|
    | rademacher | the top bit as a sign; lies exactly on the sphere of radius sqrt(d) (Spall 1992) |
    | gaussian | Box-Muller on two hashed uniforms (MeZO, arXiv 2305.17333) |
    | sphere | gaussian rescaled to norm sqrt(d) (ZO-SVRG, VAMO) |
    """

    def __init__(self, parameters: TrainableParameters, *, distribution: Distribution = "rademacher") -> None:
        self._parameters = parameters
        self._distribution = distribution
        self._sphere_scales: dict[HashKey, Tensor] = {}

    @property
    def numel(self) -> int:
        """d, the number of elements of a direction."""
        return self._parameters.numel

    def values(self, key: HashKey, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the direction, (stop - start,) float32."""
        device = self._parameters.device
        if self._distribution == "rademacher":
            return random_bits(key, start, stop, device=device).bitwise_right_shift_(31).mul_(2).add_(1).float()
        normal = _standard_normal(key, start, stop, device=device)
        return normal if self._distribution == "gaussian" else normal * self._sphere_scale(key)

    @torch.no_grad()
    def axpy_(
        self,
        tensors: Sequence[Tensor],
        coefficients: Tensor,
        keys: Sequence[HashKey],
        *,
        scales: Sequence[float] | None = None,
        rounding: HashKey | None = None,
    ) -> None:
        """`p <- scale * p + sum_j a_j z_j` in place, in one pass over memory.

        The sum over j is formed in float32 (float64 for float64 tensors) in the order of `keys`, then added.

        Args:
            tensors: one for each trainable parameter, of its shape.
            coefficients: (m,) the a_j.
            keys: the m directions.
            scales: one for each tensor, multiplies its old value; None stands for ones.
            rounding: stream for stochastic rounding of bfloat16 results; None rounds to nearest.
        """
        for start, stop in self._chunks():
            sums: dict[torch.dtype, Tensor] = {}
            directions = [self.values(key, start, stop) for key in keys]
            for segment in self._parameters.segments(start, stop):
                target = tensors[segment.index].view(-1)[segment.start : segment.stop]
                wide = torch.promote_types(target.dtype, torch.float32)
                if wide not in sums:
                    sums[wide] = _weighted_sum(directions, coefficients.to(wide))
                position = segment.offset - start
                kept = target.to(wide) if scales is None else target.to(wide) * scales[segment.index]
                moved = kept + sums[wide][position : position + target.numel()]
                if rounding is not None and target.dtype == torch.bfloat16:
                    moved = round_to_bfloat16(moved, rounding, segment.offset)
                target.copy_(moved)

    @torch.no_grad()
    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        """(m,) float64 inner products `<tensors, z_j>`, in one pass; None stands for zeros."""
        result = torch.zeros(len(keys), dtype=torch.float64, device=self._parameters.device)
        for start, stop in self._chunks():
            directions = [self.values(key, start, stop).double() for key in keys]
            for segment in self._parameters.segments(start, stop):
                tensor = tensors[segment.index]
                if tensor is None:
                    continue
                values = tensor.reshape(-1)[segment.start : segment.stop].double()
                position = segment.offset - start
                result += torch.stack([values @ z[position : position + values.numel()] for z in directions])
        return result

    @torch.no_grad()
    def gram(self, keys: Sequence[HashKey]) -> Tensor:
        """(m, m) float64, `G_jk = <z_j, z_k>`, in one pass; the diagonal is d except for gaussian directions."""
        gram = torch.zeros(len(keys), len(keys), dtype=torch.float64, device=self._parameters.device)
        if len(keys) > 1 or self._distribution == "gaussian":
            for start, stop in self._chunks():
                directions = torch.stack([self.values(key, start, stop) for key in keys]).double()
                gram += directions @ directions.T
        if self._distribution != "gaussian":
            gram.fill_diagonal_(self.numel)
        return gram

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.numel, _CHUNK):
            yield start, min(start + _CHUNK, self.numel)

    def _sphere_scale(self, key: HashKey) -> Tensor:
        """sqrt(d) / norm of the gaussian, the norm summed in float64 chunk by chunk, once per key."""
        if key not in self._sphere_scales:
            device = self._parameters.device
            square = torch.zeros((), dtype=torch.float64, device=device)
            for start, stop in self._chunks():
                square += _standard_normal(key, start, stop, device=device).double().square().sum()
            if len(self._sphere_scales) >= _MOST_SCALES:  # directions of earlier steps are not asked for again
                self._sphere_scales.clear()
            self._sphere_scales[key] = (math.sqrt(self.numel) / square.sqrt()).float()
        return self._sphere_scales[key]


def _weighted_sum(directions: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    total = directions[0].to(coefficients.dtype) * coefficients[0]
    for direction, coefficient in zip(directions[1:], coefficients[1:], strict=True):
        total += direction * coefficient
    return total


def _standard_normal(key: HashKey, start: int, stop: int, *, device: torch.device) -> Tensor:
    """Box-Muller: `sqrt(-2 ln u1) cos(2 pi u2)`, u1 in (0, 1] and u2 in [0, 1), 24 bits each."""
    radius, angle = (
        random_bits(key, start, stop, device=device, lane=lane).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float()
        for lane in (0, 1)
    )
    radius = radius.add_(1).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    return angle.mul_(2 * math.pi * 2.0**-24).cos_().mul_(radius)
