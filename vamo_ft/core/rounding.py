"""How weights of low precision take small changes."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["count_finer_than_ulp", "stochastically_rounded"]

_CHUNK = 1 << 20  # elements looked at together
_FINE = 2.0**-24  # spacing of float16 below its smallest normal value


def stochastically_rounded(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds each value up or down with probabilities that make the mean exact.

    bfloat16 is the upper half of float32, so adding 16 uniform bits to the lower half and dropping it rounds away from
    zero with probability (lower half) / 2**16. float16 drops 13 bits of the mantissa in the same way; below 2**-14,
    where its spacing is fixed, the value is counted in units of 2**-24.

    Args:
        values: float32, finite.
        bits: int32 of the same shape, uniform.
        dtype: torch.bfloat16 or torch.float16.

    Returns:
        `dtype`, of the same shape.
    """
    if dtype == torch.bfloat16:
        raised = values.view(torch.int32) + (bits & 0xFFFF)
        return (raised & -0x10000).view(torch.float32).to(dtype)
    raised = values.view(torch.int32) + (bits & 0x1FFF)
    normal = (raised & -0x2000).view(torch.float32)
    small = torch.floor(values * (1 / _FINE) + (bits & 0xFFFF).to(torch.float32) * 2.0**-16) * _FINE
    return torch.where(values.abs() < 2.0**-14, small, normal).to(dtype)


@torch.no_grad()
def count_finer_than_ulp(tensors: Iterable[Tensor], eps: float) -> int:
    """The number of elements whose spacing of representable values exceeds `eps`: they cannot move by eps exactly."""
    finer = 0
    for tensor in tensors:
        for part in torch.split(tensor.detach().reshape(-1), _CHUNK):
            _, exponent = torch.frexp(part.float())  # |x| in [1/2, 1) * 2**exponent
            spacing = torch.ldexp(torch.full_like(part, torch.finfo(part.dtype).eps / 2, dtype=torch.float32), exponent)
            finer += int(((spacing > eps) & (part != 0)).sum())
    return finer
