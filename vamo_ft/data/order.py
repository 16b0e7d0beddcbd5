"""The order in which training takes its samples: a pure function of the seed and the step."""

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from vamo_ft.core.hashing import Domain, HashKey, permutation

__all__ = ["SampleOrder", "take"]


class SampleOrder:
    """One permutation of the samples per epoch, cut into batches that run on across epochs.

    Sample t of the run is element `t % num_samples` of the permutation of epoch `t // num_samples`, and step s takes
    the samples `s * batch_size` to `(s + 1) * batch_size - 1`. So every step is known without the steps before it.
    """

    def __init__(self, num_samples: int, *, batch_size: int, seed: int) -> None:
        assert num_samples > 0 and batch_size > 0
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._drawn)

    @property
    def samples_per_epoch(self) -> int:
        """All of them."""
        return self._num_samples

    def frequency(self, index: int) -> float:
        """How often a sample is drawn, relative to the mean over all: 1."""
        return 1.0

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of step `step`, counted from 0."""
        return take(self._epoch, self._num_samples, first=step * self._batch_size, count=self._batch_size)

    def _drawn(self, epoch: int) -> Tensor:
        """(num_samples,) int64: the samples of an epoch."""
        return permutation(self._num_samples, HashKey(self._seed, Domain.ORDER, epoch, 0))


def take(epochs: Callable[[int], Tensor], length: int, *, first: int, count: int) -> tuple[int, ...]:
    """Samples `first` to `first + count - 1` of epochs of `length` samples, one after another."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, position = divmod(first + len(indices), length)
        indices += epochs(epoch)[position : position + count - len(indices)].tolist()
    return tuple(indices)
