"""Values of samples whose passes were shared out over processes."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vamo_ft.core.protocols import Runtime
from vamo_ft.core.types import Batch

__all__ = ["put_together"]


def put_together(
    runtime: Runtime, batches: Sequence[Batch], own: Sequence[Tensor], *, width: tuple[int, ...] = ()
) -> Tensor:
    """(n, *width) float64 values of all samples of all batches, in their order, to the same bits in every process.

    Each row comes from one process and is zero in the others, so that the sum over the processes leaves it as it is.
    Collective.

    Args:
        batches: of n samples together.
        own: the (B, *width) values of each batch of `runtime.mine(batches)`.
    """
    ends = list(accumulate(len(batch) for batch in batches))
    result = torch.zeros(ends[-1], *width, dtype=torch.float64, device=runtime.device)
    places = runtime.mine([slice(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)])
    for place, values in zip(places, own, strict=True):
        result[place] = values
    runtime.sum_([result])
    return result
