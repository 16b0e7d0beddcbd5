"""The order in which training takes its samples: a pure function of the seed and the step."""

from functools import lru_cache, partial

import torch
from torch import Tensor

from vamo_ft.core.hashing import Domain, HashKey, random_bits

__all__ = ["SampleOrder", "permutation"]


class SampleOrder:
    """One permutation of the samples per epoch, cut into batches that run on across epochs.

    Sample t of the run is element `t % num_samples` of the permutation of epoch `t // num_samples`, and step s takes
    the samples `s * batch_size` to `(s + 1) * batch_size - 1`. So every step is known without the steps before it.
    """

    def __init__(self, num_samples: int, *, batch_size: int, seed: int) -> None:
        assert num_samples > 0 and batch_size > 0
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._permutation = lru_cache(maxsize=2)(partial(_order_of_epoch, num_samples, seed))

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of step `step`, counted from 0."""
        indices: list[int] = []
        start = step * self._batch_size
        while len(indices) < self._batch_size:
            epoch, position = divmod(start + len(indices), self._num_samples)
            wanted = self._batch_size - len(indices)
            indices += self._permutation(epoch)[position : position + wanted].tolist()
        return tuple(indices)


def _order_of_epoch(num_samples: int, seed: int, epoch: int) -> Tensor:
    return permutation(num_samples, HashKey(seed, Domain.ORDER, epoch, 0))


def permutation(size: int, key: HashKey) -> Tensor:
    """(size,) int64: the numbers below `size` sorted by the random bits of `key`, equal bits in their own order."""
    bits = random_bits(key, 0, size, device=torch.device("cpu"))
    return torch.argsort(bits, stable=True)
