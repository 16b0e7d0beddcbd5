"""How weights of low precision take small changes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey, random_bits

__all__ = ["round_to_bfloat16", "share_finer_than_ulp"]


def round_to_bfloat16(values: Tensor, key: HashKey, start: int) -> Tensor:
    """Rounds each value up or down with probabilities that make the mean exact.

    bfloat16 is the upper half of float32, so adding 16 uniform bits to the lower half and dropping it rounds away from
    zero with probability (lower half) / 2**16.

    Args:
        values: (n,) float32, finite.
        key: stream of bits, in the rounding domain.
        start: offset of the first element.

    Returns:
        (n,) bfloat16.
    """
    noise = random_bits(key, start, start + values.numel(), device=values.device).bitwise_and_(0xFFFF)
    raised = values.contiguous().view(torch.int32) + noise
    return raised.bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def share_finer_than_ulp(tensors: Iterable[Tensor], eps: float) -> float:
    """The share of elements whose spacing of representable values exceeds `eps`: they cannot move by eps exactly."""
    finer = total = 0
    for tensor in tensors:
        _, exponent = torch.frexp(tensor.detach().float())  # |x| in [1/2, 1) * 2**exponent
        spacing = torch.ldexp(torch.full_like(tensor, torch.finfo(tensor.dtype).eps / 2, dtype=torch.float32), exponent)
        finer += int(((spacing > eps) & (tensor != 0)).sum())
        total += tensor.numel()
    return finer / total
