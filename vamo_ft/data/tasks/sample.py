"""What a task makes of a row, and how it reads a row's values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vamo_ft.core.errors import DataError
from vamo_ft.data.rows import Row
from vamo_ft.data.values import text_of

__all__ = ["Task", "TaskSample", "first_letter", "stripped", "texts_of"]


@dataclass(frozen=True, slots=True)
class TaskSample:
    """One row as text.

    Attributes:
        prompt: what is given.
        options: texts that may follow it, to be scored; empty where an answer is generated.
        right: the options that are right, by number; the first is the one to learn.
        references: right answers as text where one is generated; the first is the one to learn, after a space.
    """

    prompt: str
    options: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def completion(self) -> str:
        """The text to learn."""
        return self.options[self.right[0]] if self.options else f" {self.references[0]}"


@dataclass(frozen=True, slots=True)
class Task:
    """How the rows of a task become samples.

    Attributes:
        columns: that every row needs.
        build: makes a sample of a row and its place, which is for messages.
        words: the texts of the classes, where all rows have the same.
    """

    columns: tuple[str, ...]
    build: Callable[[Row, str], TaskSample]
    words: tuple[str, ...] = ()


def stripped(row: Row, column: str, place: str) -> str:
    """The text of a column without white space around it.

    Raises:
        DataError: there is no text.
    """
    text = text_of(row, column, place=place).strip()
    if not text:
        raise DataError(f"{place}: column '{column}' is empty")
    return text


def texts_of(row: Row, column: str, field: str | None, *, place: str) -> tuple[str, ...]:
    """The different texts of a column that holds a list, in their order, without white space around them.

    Args:
        field: the list is this field of the column.

    Raises:
        DataError: there is no list of texts, or no text in it.
    """
    values: Any = row.get(column)
    name = f"'{column}'"
    if field is not None and isinstance(values, dict):
        values, name = values.get(field), f"'{column}', field '{field}',"
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(v, str) for v in values):
        raise DataError(f"{place}: column {name} holds no list of texts")
    texts = tuple(dict.fromkeys(text for text in map(str.strip, values) if text))
    if not texts:
        raise DataError(f"{place}: column {name} holds no text; remove the row")
    for text in texts:
        text_of({column: text}, column, place=place)
    return texts


def first_letter(text: str, change: Callable[[str], str]) -> str:
    """The text with its first letter changed."""
    return change(text[:1]) + text[1:]
