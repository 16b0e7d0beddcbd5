"""Several data sets, of which training draws each by its weight.

Shapes: n_k samples of data set k, m_k of them in an epoch, M = sum_k m_k.
"""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from vamo_ft.core.hashing import Domain, HashKey, permutation
from vamo_ft.data.order import take

__all__ = ["MixedOrder", "Mixture", "Origin"]

Origin = tuple[int, tuple[int, ...]]
"""Number of a data set, and numbers of rows in it, both counted from 0."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Data sets whose samples are numbered through.

    Attributes:
        sizes: n_k.
        weights: w_k, in any unit; None: every sample as often as any other, as in one data set.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def owner(self, index: int) -> int:
        """Number of the data set that a sample belongs to."""
        return bisect_right(list(accumulate(self.sizes)), index)

    @property
    def draws(self) -> tuple[int, ...]:
        """m_k, samples of each data set in an epoch.

        In proportion to the weights, `m_k = round(s w_k)` with `s = max_k n_k / w_k`: the shortest epoch that has every
        sample of every data set at least once. The set that decides it is seen once, the others more often.
        """
        if self.weights is None:
            return self.sizes
        weights = [Fraction(weight) for weight in self.weights]
        scale = max(size / weight for size, weight in zip(self.sizes, weights, strict=True))
        return tuple(round(scale * weight) for weight in weights)


class MixedOrder:
    """Every data set in permutations of its own, one after another, woven together by a permutation for each epoch.

    An epoch has m_k places for data set k (see `Mixture.draws`), which lie at random; there the set goes on where it
    stood in its own permutations, of which a small one goes through several in an epoch. The share of a data set in an
    epoch is exact, and so every sample of it is drawn `m_k / n_k` times an epoch in the long run. Steps cut the epochs
    as in `SampleOrder`, and are known without the steps before them.
    """

    def __init__(self, mixture: Mixture, *, batch_size: int, seed: int) -> None:
        assert min(mixture.sizes) > 0 and batch_size > 0
        self._mixture = mixture
        self._sizes = mixture.sizes
        self._draws = mixture.draws
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._drawn)
        total, epoch = sum(self._sizes), sum(self._draws)
        self._frequencies = [
            draws * total / (epoch * size) for size, draws in zip(self._sizes, self._draws, strict=True)
        ]
        self._ends = tuple(accumulate(self._sizes))

    @property
    def samples_per_epoch(self) -> int:
        """M."""
        return sum(self._draws)

    def frequency(self, index: int) -> float:
        """How often a sample is drawn, relative to the mean over all: `(m_k / n_k) / (M / n)`."""
        return self._frequencies[self._mixture.owner(index)]

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of step `step`, counted from 0."""
        return take(self._epoch, self.samples_per_epoch, first=step * self._batch_size, count=self._batch_size)

    def _drawn(self, epoch: int) -> Tensor:
        """(M,) int64: the samples of an epoch."""
        places = permutation(self.samples_per_epoch, HashKey(self._seed, Domain.ORDER, epoch, 0))
        drawn = torch.empty_like(places)
        first = 0
        for number, (size, draws, end) in enumerate(zip(self._sizes, self._draws, self._ends, strict=True)):
            own = ((places >= first) & (places < first + draws)).nonzero().squeeze(1)  # (m_k,) ascending
            drawn[own] = self._passes(number, first=epoch * draws, count=draws) + (end - size)
            first += draws
        return drawn

    def _passes(self, number: int, *, first: int, count: int) -> Tensor:
        """(count,) int64: what a data set gives from its place `first` on, numbered within the set."""
        size = self._sizes[number]
        start, stop = first // size, -(-(first + count) // size)
        keys = [HashKey(self._seed, Domain.ORDER, each, number + 1) for each in range(start, stop)]
        passes = torch.cat([permutation(size, key) for key in keys])
        return passes[first - start * size :][:count]
