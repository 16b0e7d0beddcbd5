"""Tokenized samples, kept in flat arrays: one row of tokens each, with the runs of it that are supervised."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate

__all__ = ["Example", "Ids", "Spans", "TokenWriter", "TokenizedData"]

Ids = tuple[int, ...]

Spans = tuple[tuple[int, int], ...]
"""Half-open runs of places in a row of tokens, ascending and apart."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized sample.

    Attributes:
        index: its place in the data set.
        token_ids: the whole row: prompt, completion, further turns.
        supervised: the runs of tokens that are learnt. The first token of a row is never one of them, since nothing
            stands before it, and the last one always is, since nothing is learnt from what follows. None at all for a
            classifier, which reads the whole row.
        label: class number, or that of the right option.
        options: the sample's own texts to score after the prompt; none where the format's serve, or there are none.
        references: right answers as text; none: the completion is the only one.
        documents: where each of several packed documents ends in the row; none for a single one.
    """

    index: int
    token_ids: Ids
    supervised: Spans
    label: int | None = None
    options: tuple[Ids, ...] = ()
    references: tuple[str, ...] = ()
    documents: Ids = ()

    @property
    def prompt_ids(self) -> Ids:
        """What stands before the last supervised run; without one, the whole row."""
        return self.token_ids[: self.supervised[-1][0]] if self.supervised else self.token_ids

    @property
    def completion_ids(self) -> Ids:
        """The last supervised run, which ends the row."""
        return self.token_ids[self.supervised[-1][0] :] if self.supervised else ()

    @property
    def num_supervised(self) -> int:
        """Tokens that are learnt."""
        return sum(end - start for start, end in self.supervised)


@dataclass(frozen=True)
class TokenizedData:
    """All samples of a data set.

    Attributes:
        tokens: the ids of all rows in turn.
        ends: where the row of sample i ends in `tokens`.
        spans: start and end of every supervised run, counted from the start of its row.
        span_ends: where the runs of sample i end in `spans`.
        labels: class number, or that of the right option, of each sample, or None.
        options: tokens of the options of the samples that have their own.
        references: right answers of the samples that name them.
        documents: ends of the packed documents of the samples that consist of several.
        rows: number of the row, counted from 0, that each sample comes from, and each document of a packed one.
        num_truncated: samples that were cut to the maximum length.
        num_skipped: rows of the data set that were left out, since nothing in them is supervised.
    """

    tokens: "array[int]"
    ends: "array[int]"
    spans: "array[int]"
    span_ends: "array[int]"
    labels: tuple[int | None, ...]
    options: Mapping[int, tuple[Ids, ...]]
    references: Mapping[int, tuple[str, ...]]
    documents: Mapping[int, Ids]
    rows: "array[int]"
    num_truncated: int
    num_skipped: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        start, end = _bounds(self.ends, index)
        first, last = _bounds(self.span_ends, index)
        spans = self.spans[first:last]
        return Example(
            index,
            tuple(self.tokens[start:end]),
            tuple(zip(spans[::2], spans[1::2], strict=True)),
            self.labels[index],
            self.options.get(index, ()),
            self.references.get(index, ()),
            self.documents.get(index, ()),
        )

    def length(self, index: int) -> int:
        """Tokens of the whole row."""
        start, end = _bounds(self.ends, index)
        return end - start

    def prompt_length(self, index: int) -> int:
        """Tokens before the last supervised run; without one, of the whole row."""
        first, last = _bounds(self.span_ends, index)
        return self.length(index) if first == last else self.spans[last - 2]

    def input_length(self, index: int) -> int:
        """Tokens that a model reads: the last one is only predicted, where anything is."""
        first, last = _bounds(self.span_ends, index)
        return self.length(index) - (last > first)

    def num_supervised(self, index: int) -> int:
        """Tokens that are learnt."""
        first, last = _bounds(self.span_ends, index)
        return sum(self.spans[first + 1 : last : 2]) - sum(self.spans[first:last:2])

    def rows_of(self, index: int) -> Ids:
        """Numbers of the rows of the data set, counted from 0, that a sample comes from."""
        start, end = _bounds(self._row_ends, index)
        return tuple(self.rows[start:end])

    @cached_property
    def _row_ends(self) -> Sequence[int]:
        if not self.documents:
            return range(1, len(self) + 1)
        return array("q", accumulate(len(self.documents.get(index, (0,))) for index in range(len(self))))

    @property
    def largest_token(self) -> int:
        """The largest id that occurs; -1 where there is none."""
        return max(self.tokens, default=-1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token, boundary, supervised run, label, option, reference and packed document."""
        sizes = [len(part) for part in (self.tokens, self.ends, self.spans, self.span_ends)]
        digest = sha256(f"{sizes} {self.labels} {self.options} {self.references} {self.documents}".encode())
        for part in (self.tokens, self.ends, self.spans, self.span_ends):
            digest.update(part.tobytes())
        return digest.hexdigest()


def _bounds(ends: Sequence[int], index: int) -> tuple[int, int]:
    return ends[index - 1] if index > 0 else 0, ends[index]


class TokenWriter:
    """Collects samples, one after another."""

    def __init__(self) -> None:
        self._tokens, self._ends = array("i"), array("q")
        self._spans, self._span_ends = array("i"), array("q")
        self._labels: list[int | None] = []
        self._options: dict[int, tuple[Ids, ...]] = {}
        self._references: dict[int, tuple[str, ...]] = {}
        self._documents: dict[int, Ids] = {}
        self._rows = array("q")
        self._next_row = 0
        self._num_truncated = 0
        self._num_skipped = 0

    @property
    def num_samples(self) -> int:
        """Samples so far."""
        return len(self._labels)

    @property
    def next_row(self) -> int:
        """The first row of the data set, counted from 0, that is neither in a sample nor left out."""
        return self._next_row

    def append(
        self,
        token_ids: Sequence[int],
        supervised: Spans,
        *,
        label: int | None = None,
        options: tuple[Ids, ...] = (),
        references: tuple[str, ...] = (),
        documents: Ids = (),
        rows: Ids | None = None,
        truncated: bool = False,
    ) -> None:
        """Adds one sample; see `Example`.

        Args:
            rows: of the data set that it comes from, one for each document; None: the next one.
        """
        assert not supervised or (supervised[0][0] > 0 and supervised[-1][1] == len(token_ids))
        index = self.num_samples
        self._tokens.extend(token_ids)
        self._ends.append(len(self._tokens))
        for span in supervised:
            self._spans.extend(span)
        self._span_ends.append(len(self._spans))
        self._labels.append(label)
        if options:
            self._options[index] = options
        if references:
            self._references[index] = references
        if documents:
            self._documents[index] = documents
        rows = (self._next_row,) if rows is None else rows
        self._rows.extend(rows)
        self._next_row = max(self._next_row, max(rows) + 1)
        self._num_truncated += truncated

    def skip(self) -> None:
        """Leaves the next row out."""
        self._next_row += 1
        self._num_skipped += 1

    def finish(self) -> TokenizedData:
        """All samples."""
        return TokenizedData(
            self._tokens,
            self._ends,
            self._spans,
            self._span_ends,
            tuple(self._labels),
            self._options,
            self._references,
            self._documents,
            self._rows,
            self._num_truncated,
            self._num_skipped,
        )
