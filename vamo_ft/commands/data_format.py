"""Which format a file's columns call for. Reads the first rows without the libraries that training needs."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from vamo_ft.core.errors import UsageError

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
_TEXTS = ("sentence", "text", "content", "review", "document")
_LABELS = ("label", "labels", "topic", "category", "class", "sentiment")


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
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UsageError(f"--data: {file}: cannot be read ({reason})") from error
    columns = list(rows[0]) if rows and isinstance(rows[0], Mapping) else []
    if (section := _section(columns, rows)) is None:
        raise UsageError(
            f"--data: {file}: the columns ({', '.join(map(str, columns)) or 'none'}) tell no format; leave --data out, "
            "and write data.train.path and data.format in the new file"
        )
    return section


def _section(columns: list[str], rows: list[Any]) -> dict[str, Any] | None:
    for column in _CONVERSATIONS:
        if column in columns and isinstance(rows[0][column], list):
            return {"type": "chat", "messages": column}
    for prompt, completion in _PAIRS:
        if prompt in columns and completion in columns:
            ending = "" if prompt == "prompt" else "\n"  # a prompt says itself how it ends
            return {
                "type": "prompt_completion",
                "prompt": f"{{{prompt}}}{ending}",
                "completion": f"{{{completion}}}",
            }
    text = next((column for column in _TEXTS if column in columns), None)
    label = next((column for column in _LABELS if column in columns), None)
    if text is None:
        return None
    if label is None:
        return {"type": "text", "column": text}
    values = sorted({_label(row[label]) for row in rows if isinstance(row, Mapping) and row.get(label) is not None})
    if not 2 <= len(values) <= _MOST_LABELS:
        return None
    return {
        "type": "classification",
        "template": f"{{{text}}}\n{label.capitalize()}:",
        "label": label,
        "labels": {value: f" {value}" for value in values},
    }


def _label(value: Any) -> str:
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
