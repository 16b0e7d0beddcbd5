"""A part of the samples as a source of its own."""

from collections.abc import Sequence
from dataclasses import replace

from vamo_ft.core.protocols import SampleSource
from vamo_ft.core.types import Batch

__all__ = ["SampleSubset"]


class SampleSubset:
    """Some samples of a source, numbered anew from 0 (implements `core.protocols.SampleSource`).

    Args:
        indices: of the samples in `source`, each once.
    """

    def __init__(self, source: SampleSource, indices: Sequence[int]) -> None:
        assert len(set(indices)) == len(indices), "each sample once"
        self._source = source
        self._indices = tuple(indices)
        self._numbers = {index: number for number, index in enumerate(indices)}

    @property
    def num_samples(self) -> int:
        """Number of samples, indexed 0 to num_samples - 1."""
        return len(self._indices)

    @property
    def samples_per_epoch(self) -> int:
        """All of them."""
        return self.num_samples

    @property
    def batch_size(self) -> int:
        """Samples of one training step."""
        return self._source.batch_size

    @property
    def fingerprint(self) -> str:
        """Of the whole source, and of which samples these are."""
        return f"{self._source.fingerprint} {self._indices}"

    def numbers(self, indices: Sequence[int]) -> list[int]:
        """The numbers here of samples of the source."""
        return [self._numbers[index] for index in indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order."""
        return replace(self._source.batch([self._indices[number] for number in indices]), indices=tuple(indices))

    def length(self, index: int) -> int:
        """Tokens of a sample's longest row."""
        return self._source.length(self._indices[index])

    def frequency(self, index: int) -> float:
        """1: each as often as any other."""
        return 1.0

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """As the source groups them."""
        groups = self._source.groups([self._indices[number] for number in indices], token_budget=token_budget)
        return [tuple(self.numbers(group)) for group in groups]

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples in their order, over and over."""
        first = step * self.batch_size
        return tuple(place % self.num_samples for place in range(first, first + self.batch_size))
