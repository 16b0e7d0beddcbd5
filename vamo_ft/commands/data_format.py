"""Which format a file's columns call for. Reads the first rows without the libraries that training needs."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from vamo_ft.core.errors import UsageError, first_line

__all__ = ["format_of"]

_ROWS = 2000  # that are looked at for labels
_MOST_LABELS = 20
_CONVERSATIONS = ("messages", "conversations")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
_GROUNDS = ("input", "context")  # what an instruction or a question is about, as in Alpaca and Dolly
_TEXTS = ("sentence", "text", "content", "review", "document")
_LABELS = ("label", "labels", "topic", "category", "class", "sentiment")

_WITHOUT = "leave --data out, and write data.train.path and data.format in the new file"


class _NoClassesError(Exception):
    """A column is called as labels are, and holds none that a classification could learn."""

    def __init__(self, column: str, *, num_values: int, num_rows: int) -> None:
        super().__init__(
            f"column '{column}' has {num_values:,} different value{'' if num_values == 1 else 's'} in the first "
            f"{num_rows:,} row{'' if num_rows == 1 else 's'}, and a classification is written for 2 to {_MOST_LABELS}"
        )


def format_of(path: str) -> dict[str, Any]:
    """The `data.format` section for a local file, or for the first file of a folder.

    Conversations, prompts with completions, labelled texts and plain texts are told by the names of their columns, in
    this order.

    Raises:
        UsageError: there is no such file, it cannot be read, or its columns fit no format.
    """
    file = _file(path)
    try:
        rows = list(islice(_READERS[file.suffix](file), _ROWS))
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UsageError(f"--data: {file}: cannot be read ({reason})") from error
    columns = list(rows[0]) if rows and isinstance(rows[0], Mapping) else []
    try:
        section = _section(columns, rows)
    except _NoClassesError as error:
        raise UsageError(f"--data: {file}: {error}; {_WITHOUT}") from None
    if section is None:
        listed = ", ".join(map(str, columns)) or "none"
        raise UsageError(f"--data: {file}: the columns ({listed}) tell no format; {_WITHOUT}")
    return section


def _section(columns: list[str], rows: list[Any]) -> dict[str, Any] | None:
    for column in _CONVERSATIONS:
        if column in columns and isinstance(rows[0][column], list):
            return {"type": "chat", "messages": column}
    for prompt, completion in _PAIRS:
        if prompt in columns and completion in columns:
            read = [prompt, *(column for column in _GROUNDS if column != prompt and _is_text(rows, column))]
            return {
                "type": "prompt_completion",
                # a prompt says itself what it is about and how it ends
                "prompt": "{prompt}" if prompt == "prompt" else "".join(f"{{{column}}}\n" for column in read),
                "completion": f"{{{completion}}}",
            }
    text = next((column for column in _TEXTS if column in columns), None)
    label = next((column for column in _LABELS if column in columns), None)
    if text is None:
        return None
    if label is None:
        return {"type": "text", "column": text}
    values = sorted({_label(row[label]) for row in rows if isinstance(row, Mapping) and _is_value(row.get(label))})
    if not 2 <= len(values) <= _MOST_LABELS:
        raise _NoClassesError(label, num_values=len(values), num_rows=len(rows))
    return {
        "type": "classification",
        "template": f"{{{text}}}\n{label.capitalize()}:",
        "label": label,
        "labels": {value: f" {value}" for value in values},
    }


def _is_text(rows: list[Any], column: str) -> bool:
    """Whether every row has a text there, if an empty one."""
    return all(isinstance(row, Mapping) and isinstance(row.get(column), str) for row in rows)


def _is_value(value: Any) -> bool:
    return value is not None and value == value  # NaN is how data frames write a missing value


def _label(value: Any) -> str:
    """As labels are compared when the data is read: `true` for a boolean, `1` for 1.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _file(path: str) -> Path:
    if isfile(path):
        found = [Path(path)]
    elif isdir(path):
        found = sorted(file for file in Path(path).rglob("*") if file.suffix in _READERS)
    else:
        raise UsageError(
            f"--data: {path}: there is no such file; for a data set of the Hub leave --data out, and write its id as "
            "data.train.path in the new file"
        )
    if not found or found[0].suffix not in _READERS:
        raise UsageError(f"--data: {path}: is none of {', '.join(_READERS)}")
    return found[0]


def _jsonl(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _json(file: Path) -> Iterator[Any]:
    values = json.loads(file.read_text(encoding="utf-8-sig"))
    yield from values if isinstance(values, list) else []


def _csv(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _parquet(file: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    with ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=_ROWS):
            yield from batch.to_pylist()


_READERS: Mapping[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
