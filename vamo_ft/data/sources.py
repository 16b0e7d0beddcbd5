"""Reads a data set, from files or from the Hub, as rows of named values.

Files are read without schema inference: JSON values keep the types they were written with, CSV values stay text, and
nothing is cached, so that an edited file gives its new rows.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import chain, islice
from os.path import exists, expanduser
from pathlib import Path
from typing import Any

from vamo_ft.config.data import DataSetConfig
from vamo_ft.core.errors import DataError, first_line
from vamo_ft.data.hub import load_hub
from vamo_ft.data.rows import Row, Rows, rename_columns
from vamo_ft.data.splits import is_whole, select, split_names
from vamo_ft.data.stopping import until_stopped

__all__ = ["Row", "Rows", "load_rows", "local_files", "numbered_lines", "read_rows"]


def load_rows(config: DataSetConfig, *, offline: bool, stop_requested: Callable[[], bool] = lambda: False) -> Rows:
    """The rows of a local file or folder, or else of a Hub data set; at least one.

    Args:
        offline: make no network call; a Hub data set must be in the local cache.
        stop_requested: asked at every row of a local file and of a stream.

    Raises:
        DataError: there is no such data, it is empty, or it cannot be read.
        StopRequested: between two rows.
    """
    local = exists(expanduser(config.path)) or _looks_local(config.path)
    try:
        rows = (
            _load_local(config, stop_requested)
            if local
            else load_hub(config, offline=offline, stop_requested=stop_requested)
        )
    except OSError as error:
        raise DataError(f"{error.filename or config.path}: cannot be read ({error.strerror or error})") from error
    if len(rows) == 0:
        raise DataError(f"{rows.place}: no rows")
    return rename_columns(rows, config.columns)


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a file: a Hub id is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or Path(path).suffix in _READERS


def _load_local(config: DataSetConfig, stop_requested: Callable[[], bool]) -> Rows:
    path = Path(expanduser(config.path))
    hub_keys = [key for key in ("name", "revision") if getattr(config, key) is not None]
    if hub_keys:
        raise DataError(f"{path}: a local {'file' if path.is_file() else 'folder'} has no {hub_keys[0]}; leave it out")
    splits = {
        name: until_stopped(chain.from_iterable(map(read_rows, files)), stop_requested)
        for name, files in local_files(path, config.split).items()
    }
    if config.split is None or is_whole(config.split):
        place = str(path)
        values: Iterator[Row] = chain.from_iterable(splits.values())
    else:
        place = f"{path} ({config.split})"
        values = select(config.split, {name: list(some) for name, some in splits.items()}, place=str(path))
    rows = list(islice(values, config.limit))
    columns = dict.fromkeys(name for row in rows for name in row)
    return Rows(place, tuple(columns), rows)


def local_files(path: Path, split: str | None) -> dict[str, list[Path]]:
    """The files of a local data set by the splits that are asked for; a file is the split `train` of its own.

    Raises:
        DataError: there are none.
    """
    names = [None] if split is None else split_names(split)
    if path.is_dir():
        chosen = {name or "train": _files_of_folder(path, split=name) for name in names}
    elif path.is_file() and any(name not in (None, "train") for name in names):
        raise DataError(f"{path}: a local file has no split '{names[0]}'; it is the split 'train', or leave split out")
    else:
        chosen = {"train": [path]}
    for file in chain.from_iterable(chosen.values()):
        _check_file(file)
    return chosen


def _files_of_folder(folder: Path, *, split: str | None) -> list[Path]:
    """The files of one split, sorted. Without a split: `train`, or every file when none has that name."""
    files = sorted(file for file in folder.iterdir() if _is_data(file))
    if not files:
        raise DataError(f"{folder}: the folder has no {_SUFFIXES} file")
    chosen = [file for file in files if _is_of_split(file, split or "train")]
    if not chosen and split is not None:
        raise DataError(f"{folder}: no file of split '{split}'; the folder has {_listed(files)}")
    chosen = chosen or files
    if len({file.suffix for file in chosen}) > 1:
        raise DataError(f"{folder}: files of several kinds ({_listed(chosen)}); name one of them, or set split")
    return chosen


def _is_data(file: Path) -> bool:
    return file.suffix in _READERS and file.is_file()


def _is_of_split(file: Path, split: str) -> bool:
    """`train.jsonl`, `train-00000-of-00002.parquet`, `train_1.csv`."""
    return file.stem == split or file.stem.startswith((f"{split}-", f"{split}_", f"{split}."))


def _check_file(file: Path) -> None:
    if not file.exists():
        if file.is_symlink():
            raise DataError(f"{file}: is a symbolic link to {file.readlink()}, which is not there")
        raise DataError(f"{file}: no such file or folder; {_neighbours(file)}")
    if file.suffix not in _READERS:
        raise DataError(f"{file}: unknown suffix '{file.suffix}'; use {_SUFFIXES}")


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of one file, read as they are asked for."""
    return _READERS[file.suffix](file)


def _neighbours(file: Path) -> str:
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}"
    others = {other.name: other for other in sorted(file.parent.iterdir()) if _is_data(other)}
    similar = [others[name] for name in get_close_matches(file.name, others, n=5)] or list(others.values())
    return f"{file.parent.resolve()} has {_listed(similar) if similar else f'no {_SUFFIXES} file'}"


def _listed(files: Sequence[Path]) -> str:
    names = [file.name for file in files[:5]]
    return ", ".join(names) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines as (number from 1, text), cut at line feeds only: JSON strings may hold other separators."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}:{number}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
                ) from error
            if "\0" in text:
                raise DataError(
                    f"{file}:{number}: holds a NUL byte, so it is not a text file, or in UTF-16; save it as UTF-8"
                )
            yield number, text


def _parse_json(text: str, *, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{line + error.lineno - 1}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets of great depth
        raise DataError(f"{file}:{line}: not valid JSON ({error})") from error


def _checked_row(value: Any, *, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: not a JSON object; write one object with the columns as keys")
    return value


def _check_surrogates(value: Any, *, text: str, place: str) -> None:
    """JSON can escape half of a surrogate pair, which no tokenizer takes and no log can hold."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{place}: {half} alone is half of a character; write both halves, or the character") from error


def _read_json_lines(file: Path) -> Iterator[Row]:
    for number, line in numbered_lines(file):
        if text := line.strip():
            row = _parse_json(text, file=file, line=number)
            _check_surrogates(row, text=text, place=f"{file}:{number}")
            yield _checked_row(row, place=f"{file}:{number}")


def _read_json(file: Path) -> Iterator[Row]:
    """A list of objects, or JSON lines under the suffix `.json`."""
    text = "".join(line for _, line in numbered_lines(file))
    if not text.lstrip().startswith("["):
        _refuse_one_object(text.strip(), file=file)
        yield from _read_json_lines(file)
        return
    for index, value in enumerate(_parse_json(text, file=file, line=1), start=1):
        _check_surrogates(value, text=text, place=f"{file}: element {index}")
        yield _checked_row(value, place=f"{file}: element {index}")


def _refuse_one_object(text: str, *, file: Path) -> None:
    """An object over many lines: as JSON lines its first one alone would be called invalid."""
    try:
        whole = "\n" in text and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):  # JSON lines, or told with its line by who reads them
        return
    if whole:
        raise DataError(f"{file}: holds one JSON object; write a list of objects, or one object a line")


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, refuses long documents
    reader = csv.reader((line for _, line in numbered_lines(file)), strict=True)
    start = 1  # of the row that is read; quoted fields go over several lines
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise DataError(f"{file}:1: a column name occurs twice in the header: {', '.join(columns)}")
        start = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(columns):
                raise DataError(f"{file}:{start}: {len(values)} fields; the header has {len(columns)}")
            if values:
                yield dict(zip(columns, values, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        line, reason = reader.line_num, str(error)
        if "unexpected end" in reason:
            line, reason = start, "a quoted field of this row is never closed"
        elif "new-line character" in reason:
            reason = "a carriage return outside of quotes; end lines with line feeds"
        raise DataError(f"{file}:{line}: not valid CSV ({reason})") from error


def _read_parquet(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (
        ArrowException,
        OSError,
        ValueError,
    ) as error:  # damaged pages are OSErrors, bytes that are not text ValueErrors
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{file}: not a valid Parquet file ({first_line(error)})") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_SUFFIXES = ".jsonl, .json, .csv or .parquet"
