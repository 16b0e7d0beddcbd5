"""The samples of a run: what training draws from, and what evaluation goes through."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from vamo_ft.core.types import Batch
from vamo_ft.data.examples import Example, TokenizedData
from vamo_ft.data.mixture import MixedOrder, Mixture, Origin
from vamo_ft.data.order import SampleOrder
from vamo_ft.data.parts import Part, part_indices

__all__ = ["EvaluationSamples", "Layout", "TrainingSamples"]

Collate = Callable[[Sequence[Example]], Batch]


@dataclass(frozen=True, slots=True)
class Layout:
    """How samples are put into a batch, and the room they take there.

    Attributes:
        collate: makes a batch of samples.
        length: tokens of the longest row of the sample at an index, generated ones included.
        num_rows: rows of the sample at an index.
        scored_by: what decides the scores beside the data: tokens of each class, or the longest answer.
    """

    collate: Collate
    length: Callable[[TokenizedData, int], int] = TokenizedData.input_length
    num_rows: Callable[[TokenizedData, int], int] = lambda data, index: 1
    scored_by: tuple[object, ...] = ()

    def longest(self, data: TokenizedData) -> int:
        """Tokens of the longest row."""
        return max(self.length(data, index) for index in range(len(data)))

    def groups(self, data: TokenizedData, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """`indices` by falling length, ties in their order: trouble with memory shows in the first group."""
        lengths = [self.length(data, index) for index in indices]
        groups: list[list[int]] = []
        room = 0  # rows that still fit the open group
        for place in sorted(range(len(indices)), key=lambda place: -lengths[place]):
            rows = self.num_rows(data, indices[place])
            if room < rows:
                groups.append([])
                room = max(rows, token_budget // lengths[place])
            groups[-1].append(indices[place])
            room -= rows
        return [tuple(group) for group in groups]


class TrainingSamples:
    """The training data and the order in which steps take it; a `core.protocols.SampleSource`.

    Args:
        data: the tokenized samples.
        layout: how they are put into a batch.
        batch_size: samples of one step.
        seed: keys the order.
        mixture: the data sets whose samples these are; None: a single one.
    """

    def __init__(
        self, data: TokenizedData, *, layout: Layout, batch_size: int, seed: int, mixture: Mixture | None = None
    ) -> None:
        self.data = data
        self.mixture = mixture or Mixture((len(data),))
        self._layout = layout
        self._batch_size = batch_size
        self._order = (
            SampleOrder(len(data), batch_size=batch_size, seed=seed)
            if self.mixture.weights is None
            else MixedOrder(self.mixture, batch_size=batch_size, seed=seed)
        )

    @property
    def num_samples(self) -> int:
        """Number of samples, indexed 0 to num_samples - 1."""
        return len(self.data)

    @property
    def batch_size(self) -> int:
        """Samples of one training step."""
        return self._batch_size

    @property
    def samples_per_epoch(self) -> int:
        """Samples that steps draw in an epoch."""
        return self._order.samples_per_epoch

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token and label, and of the data sets' sizes and weights where they decide the order."""
        if self.mixture.weights is None:
            return self.data.fingerprint
        return sha256(f"{self.data.fingerprint} {self.mixture.sizes} {self.mixture.draws}".encode()).hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest row, generated ones included."""
        return self._layout.longest(self.data)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order."""
        return self._layout.collate([self.data[index] for index in indices])

    def length(self, index: int) -> int:
        """Tokens of the longest row of the sample at `index`, generated ones included."""
        return self._layout.length(self.data, index)

    def origin(self, index: int) -> Origin:
        """The data set that a sample comes from, and its rows there."""
        return self.mixture.owner(index), self.data.rows_of(index)

    def frequency(self, index: int) -> float:
        """How often steps draw a sample, relative to the mean over all."""
        return self._order.frequency(index)

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """`indices`, longest first, cut so that rows times longest length stays within `token_budget`.

        A sample longer than the budget is a group of its own.
        """
        return self._layout.groups(self.data, indices, token_budget=token_budget)

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of training step `step`, counted from 0."""
        return self._order.step_indices(step)


class EvaluationSamples:
    """Held-out data, gone through once per evaluation.

    Args:
        data: the tokenized samples.
        layout: how they are put into a batch.
        part: the half of them that is gone through; None: all.
    """

    def __init__(self, data: TokenizedData, *, layout: Layout, part: Part | None = None) -> None:
        self.data = data
        self._layout = layout
        self._part = part
        self.indices: Sequence[int] = range(len(data)) if part is None else part_indices(len(data), part)
        """The samples in `data` that are gone through, ascending."""

    @property
    def num_samples(self) -> int:
        """Number of samples that are gone through."""
        return len(self.indices)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token and label, of what they are scored by, and of which half is meant."""
        part = "" if self._part is None else f" {self._part}"
        return sha256(f"{self.data.fingerprint} {self._layout.scored_by}{part}".encode()).hexdigest()

    def half(self, part: Part) -> "EvaluationSamples":
        """A half of the data."""
        return EvaluationSamples(self.data, layout=self._layout, part=part)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, generated ones included."""
        return self._layout.longest(self.data)

    def batches(self, *, token_budget: int) -> Iterator[Batch]:
        """Every sample once, longest first; rows times longest length stays within `token_budget` where it can."""
        for group in self.groups(token_budget=token_budget):
            yield self._layout.collate([self.data[index] for index in group])

    def groups(self, *, token_budget: int) -> list[tuple[int, ...]]:
        """The samples of each batch, so that their number is known beforehand."""
        return self._layout.groups(self.data, self.indices, token_budget=token_budget)
