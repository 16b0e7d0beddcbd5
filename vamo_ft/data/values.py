"""Values of a row as text, with the place in every message."""

from collections.abc import Iterator, Sequence
from typing import Any

from vamo_ft.core.errors import DataError
from vamo_ft.data.rows import Row, Rows

__all__ = ["check_columns", "label_key", "numbered", "shown", "text_of", "value_of"]

_SHOWN = 60
"""Characters of a value that a message quotes."""


def check_columns(rows: Rows, columns: Sequence[str], *, key: str) -> None:
    """Refuses a data set without one of `columns`.

    Args:
        key: of the configuration, which names them.

    Raises:
        DataError: names the columns that there are.
    """
    for column in columns:
        if column not in rows.columns:
            raise DataError(f"{rows.place}: no column '{column}' ({key}); the columns are {', '.join(rows.columns)}")


def value_of(row: Row, column: str, *, place: str) -> str | bool | int | float:
    """The value of a column.

    Raises:
        DataError: it is missing, null, or no single value.
    """
    value: Any = row.get(column)
    if value is None or value != value:  # NaN is how data frames write a missing value
        raise DataError(f"{place}: column '{column}' is {'null' if column in row else 'missing'}")
    if not isinstance(value, str | bool | int | float):
        raise DataError(f"{place}: column '{column}' holds a {type(value).__name__}; use text, a number, true or false")
    return value


def text_of(row: Row, column: str, *, place: str) -> str:
    """The value of a column as text: `true` for a boolean.

    Raises:
        DataError: it is missing, null, no single value, or no valid Unicode.
    """
    value = value_of(row, column, place=place)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise DataError(f"{place}: column '{column}' is not valid Unicode at character {error.start + 1}") from error
    return text


def label_key(value: str | bool | int | float) -> str:
    """How a label is compared: `true` for a boolean in any spelling, `1` for 1.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value)
    return text.lower() if text in ("True", "False") else text


def shown(text: str) -> str:
    """The text as a message quotes it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def numbered(rows: Rows) -> Iterator[tuple[str, Row]]:
    """The rows with their places for messages."""
    for number, row in enumerate(rows.rows):
        yield rows.place_of(number), row
