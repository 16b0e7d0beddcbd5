"""Bootstrap intervals (Efron 1979) from a generator of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.hashing import Domain, HashKey

__all__ = ["Interval", "resamples"]

_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the interval that holds the middle of its bootstrap distribution."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Tensor, draws: Tensor, *, share: float = 0.9) -> "Interval":
        """From () an estimate and (R,) its values on resamples, of which the middle `share` counts."""
        low, high = torch.quantile(draws, draws.new_tensor([(1 - share) / 2, (1 + share) / 2])).tolist()
        return cls(float(value), low, high)


def resamples(count: int, *, seed: int) -> Tensor:
    """(R, count) int64, numbers from 0 to count - 1 drawn with replacement, R times."""
    first, second = HashKey(seed, Domain.DIAGNOSIS, 0, 0).words
    generator = torch.Generator().manual_seed(first << 32 | second)
    return torch.randint(count, (_DRAWS, count), generator=generator)
