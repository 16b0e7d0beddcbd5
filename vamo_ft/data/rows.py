"""Rows of named values, wherever they come from."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, overload

from vamo_ft.core.errors import DataError
from vamo_ft.data.stopping import until_stopped

__all__ = ["Row", "Rows", "rename_columns"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set before formatting.

    Attributes:
        place: what the user called it, for messages.
        columns: every column that occurs.
        rows: the rows in order; a row may lack a column.
        numbers: which rows of the data set they are, counted from 0; None: all from the first one on.
        identity: what the datasets library calls this content; None where it has not read it.
    """

    place: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    numbers: Sequence[int] | None = None
    identity: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def place_of(self, row: int) -> str:
        """Where a row, counted from 0, stands in the data set, for messages."""
        return f"{self.place}: row {(row if self.numbers is None else self.numbers[row]) + 1}"

    def content_hash(self, stop_requested: Callable[[], bool]) -> str:
        """SHA-256 of every value with its type, or of the library's name for the content, which costs no reading.

        Raises:
            StopRequested: between two rows.
        """
        digest = sha256(f"{self.identity} {self.columns}".encode("utf-8", "surrogatepass"))
        if self.identity is None:
            for row in until_stopped(self.rows, stop_requested):
                digest.update(json.dumps(row, default=_shown).encode())
                digest.update(b"\n")
        return digest.hexdigest()


def _shown(value: object) -> list[str]:
    """In place of what JSON has no form for, such as a date of a Parquet file."""
    return [type(value).__name__, repr(value)]


def rename_columns(rows: Rows, names: Mapping[str, str]) -> Rows:
    """The same rows under other names.

    A new name covers a column that has it already; two of them may stand for one column. Columns that are not renamed
    keep their names.

    Args:
        names: new name -> the data set's own name.

    Raises:
        DataError: there is no such column.
    """
    if not names:
        return rows
    for new, old in names.items():
        if old not in rows.columns:
            raise DataError(
                f"{rows.place}: no column '{old}' (columns.{new}); the columns are {', '.join(rows.columns)}"
            )
    kept = [column for column in rows.columns if column not in names and column not in names.values()]
    return replace(rows, columns=(*names, *kept), rows=_Renamed(rows.rows, names))


class _Renamed(Sequence[Row]):
    def __init__(self, rows: Sequence[Row], names: Mapping[str, str]) -> None:
        self._rows = rows
        self._names = names
        self._gone = {*names, *names.values()}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return map(self._rename, self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._rename(self._rows[index])

    def _rename(self, row: Row) -> Row:
        kept = {name: value for name, value in row.items() if name not in self._gone}
        return {new: row[old] for new, old in self._names.items() if old in row} | kept
