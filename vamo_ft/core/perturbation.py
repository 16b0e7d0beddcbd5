"""The one way to reach a probe point `x + sum_j a_j z_j`, and back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions

__all__ = ["perturbed", "placed_at"]


@contextmanager
def placed_at(parameters: TrainableParameters, values: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the parameters hold `values`; afterwards, also after an error, their old bits."""
    saved = parameters.copy()
    try:
        parameters.assign(values)
        yield
    finally:
        parameters.assign(saved)


@contextmanager
def perturbed(
    parameters: TrainableParameters, directions: Directions, *, key: HashKey, coefficient: float
) -> Iterator[None]:
    """Within the block the parameters are at `x + coefficient * z(key)`; afterwards, also after an error, at x.

    The old values are kept as a copy and restored bit for bit. bfloat16 points are rounded stochastically, so that the
    mean of the effective direction is z (nearest rounding would move small weights too far and large ones not at all).
    """
    saved = parameters.copy()
    rounding = HashKey(key.seed, Domain.ROUNDING, key.step, 2 * key.probe + (coefficient < 0))
    amount = torch.tensor([coefficient], dtype=torch.float64, device=parameters.device)
    try:
        directions.axpy_(parameters.tensors, amount, [key], rounding=rounding)
        yield
    finally:
        parameters.assign(saved)
