"""Turns rows into prompts and completions, or into documents."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vamo_ft.config.data import ClassificationFormat, PromptCompletionFormat, TextFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.sources import Row, Rows

__all__ = ["TextExample", "check_columns", "format_rows", "numbered", "read_documents"]

_SHOWN = 60
"""Characters of a value that a message quotes."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+")


@dataclass(frozen=True, slots=True)
class TextExample:
    """One sample as text.

    Attributes:
        label: the class number, in the order of `data.format.labels`, or that of the right one of `options`; or None.
        options: the sample's own texts to score after the prompt; none where those of the format serve.
        references: right answers, where there are several; none: the completion is the only one.
    """

    prompt: str
    completion: str
    label: int | None
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Column:
    name: str


@dataclass(frozen=True, slots=True)
class _Template:
    """Literal text and columns. A column is looked up by name and nothing else: no attributes, items or formats."""

    pieces: tuple[str | _Column, ...]

    @classmethod
    def parse(cls, text: str, *, key: str) -> "_Template":
        pieces: list[str | _Column] = []
        for match in _PIECE.finditer(text):
            if match[1] is not None:
                pieces.append(_Column(match[1]))
            elif match[0] in ("{", "}"):
                raise DataError(
                    f"{key}: '{match[0]}' at character {match.start() + 1} is not part of a '{{column}}'; "
                    f"write '{match[0] * 2}' for the character itself"
                )
            else:
                pieces.append(match[0][0] if match[0] in ("{{", "}}") else match[0])
        return cls(tuple(pieces))

    @property
    def columns(self) -> list[str]:
        return [piece.name for piece in self.pieces if isinstance(piece, _Column)]

    def fill(self, row: Row, *, place: str) -> str:
        return "".join(
            _text(row, piece.name, place=place) if isinstance(piece, _Column) else piece for piece in self.pieces
        )


def format_rows(rows: Rows, config: ClassificationFormat | PromptCompletionFormat) -> Iterator[TextExample]:
    """The rows as text, one after another; templates and columns are checked before the first row is formatted.

    Raises:
        DataError: a template is malformed or names a column that does not exist; from the iterator: a value is missing
            or null, a label is unknown, or a completion is empty.
    """
    match config:
        case ClassificationFormat():
            template = _Template.parse(config.template, key="data.format.template")
            check_columns(rows, template.columns, key="data.format.template")
            check_columns(rows, [config.label], key="data.format.label")
            return _classification(rows, config, template)
        case PromptCompletionFormat():
            prompt = _Template.parse(config.prompt, key="data.format.prompt")
            completion = _Template.parse(config.completion, key="data.format.completion")
            check_columns(rows, prompt.columns, key="data.format.prompt")
            check_columns(rows, completion.columns, key="data.format.completion")
            return _prompt_completion(rows, prompt, completion)


def read_documents(rows: Rows, config: TextFormat) -> Iterator[str]:
    """The documents, one after another; whether their column exists is checked before the first one is read.

    Raises:
        DataError: there is no such column; from the iterator: a value is missing, null, or not text.
    """
    check_columns(rows, [config.column], key="data.format.column")
    return (_text(row, config.column, place=place) for place, row in numbered(rows))


def check_columns(rows: Rows, columns: Sequence[str], *, key: str) -> None:
    """Refuses columns that no row has."""
    for column in columns:
        if column not in rows.columns:
            raise DataError(f"{rows.place}: no column '{column}' ({key}); the columns are {', '.join(rows.columns)}")


def _classification(rows: Rows, config: ClassificationFormat, template: _Template) -> Iterator[TextExample]:
    classes = {_label_key(key): index for index, key in enumerate(config.labels)}
    completions = list(config.labels.values())
    for place, row in numbered(rows):
        key = _label_key(_value(row, config.label, place=place))
        if key not in classes:
            shown = key if len(key) <= _SHOWN else f"{key[:_SHOWN]}..."
            raise DataError(f"{place}: label '{shown}' is not among data.format.labels ({', '.join(config.labels)})")
        yield TextExample(template.fill(row, place=place), completions[classes[key]], classes[key])


def _prompt_completion(rows: Rows, prompt: _Template, completion: _Template) -> Iterator[TextExample]:
    for place, row in numbered(rows):
        text = completion.fill(row, place=place)
        if not text.strip():
            raise DataError(f"{place}: the completion is empty, so there is nothing to learn; remove the row")
        yield TextExample(prompt.fill(row, place=place), text, None)


def numbered(rows: Rows) -> Iterator[tuple[str, Row]]:
    """Every row with its place, for messages."""
    for number, row in enumerate(rows.rows, start=1):
        yield f"{rows.place}: row {number}", row


def _value(row: Row, column: str, *, place: str) -> str | bool | int | float:
    value: Any = row.get(column)
    if value is None or value != value:  # NaN is how data frames write a missing value
        raise DataError(f"{place}: column '{column}' is {'null' if column in row else 'missing'}")
    if not isinstance(value, str | bool | int | float):
        raise DataError(f"{place}: column '{column}' holds a {type(value).__name__}; use text, a number, true or false")
    return value


def _text(row: Row, column: str, *, place: str) -> str:
    value = _value(row, column, place=place)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise DataError(f"{place}: column '{column}' is not valid Unicode at character {error.start + 1}") from error
    return text


def _label_key(value: str | bool | int | float) -> str:
    """How a label is compared: `true` for a boolean in any spelling, `1` for 1.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value)
    return text.lower() if text in ("True", "False") else text
