"""Sums of directions as tensors, for whoever needs them whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions

__all__ = ["dense_sum"]


def dense_sum(
    directions: Directions, parameters: TrainableParameters, coefficients: Tensor, keys: Sequence[HashKey]
) -> dict[int, Tensor]:
    """`sum_j coefficients[j] * z(keys[j])`, at the parameters' present values.

    The sum is displaced from 0 times the parameters: some directions depend on their values.

    Returns:
        A tensor of the parameter's shape and type for each index that the directions reach.
    """
    support = directions.support(keys)
    sources = [parameters.tensors[index] for index in support]
    tensors = [torch.empty_like(source) for source in sources]
    directions.axpy_(tensors, coefficients, keys, scales=[0.0] * len(support), sources=sources, indices=support)
    return dict(zip(support, tensors, strict=True))
