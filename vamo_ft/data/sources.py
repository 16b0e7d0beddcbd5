"""Reads a data set, from files or from the Hub, as rows of named values.

Files are read without schema inference: JSON values keep the types they were written with, CSV values stay text, and
nothing is cached, so that an edited file gives its new rows.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from os.path import exists, expanduser
from pathlib import Path
from typing import Any

from vamo_ft.config.data import DataSetConfig
from vamo_ft.core.errors import DataError

__all__ = ["Row", "Rows", "load_rows", "row_places"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set before formatting.

    Attributes:
        place: what the user called it, for messages.
        columns: every column that occurs.
        rows: the rows in order; a row may lack a column.
        numbers: which rows of the data set they are, counted from 0; None: all from the first one on.
    """

    place: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def place_of(self, row: int) -> str:
        """Where a row, counted from 0, stands in the data set, for messages."""
        return f"{self.place}: row {(row if self.numbers is None else self.numbers[row]) + 1}"


def load_rows(config: DataSetConfig, *, offline: bool) -> Rows:
    """The rows of a local file or folder, or else of a Hub data set; at least one.

    Args:
        offline: make no network call; a Hub data set must be in the local cache.

    Raises:
        DataError: there is no such data, it is empty, or it cannot be read.
    """
    local = exists(expanduser(config.path)) or _looks_local(config.path)
    try:
        rows = _load_local(config) if local else _load_hub(config, offline=offline)
    except OSError as error:
        raise DataError(f"{error.filename or config.path}: cannot be read ({error.strerror or error})") from error
    if len(rows) == 0:
        raise DataError(f"{rows.place}: no rows")
    return rows


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a file: a Hub id is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or Path(path).suffix in _READERS


def _load_local(config: DataSetConfig) -> Rows:
    path = Path(expanduser(config.path))
    hub_keys = [key for key in ("name", "revision") if getattr(config, key) is not None]
    if path.is_file() and config.split is not None:
        hub_keys.append("split")
    if hub_keys:
        raise DataError(f"{path}: a local {'file' if path.is_file() else 'folder'} has no {hub_keys[0]}; leave it out")
    files = _files_of_folder(path, split=config.split) if path.is_dir() else [path]
    readers = [_reader(file) for file in files]
    values = chain.from_iterable(read(file) for read, file in zip(readers, files, strict=True))
    rows = list(islice(values, config.limit))
    columns = dict.fromkeys(name for row in rows for name in row)
    return Rows(str(path), tuple(columns), rows)


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


def _reader(file: Path) -> Callable[[Path], Iterator[Row]]:
    if not file.exists():
        if file.is_symlink():
            raise DataError(f"{file}: is a symbolic link to {file.readlink()}, which is not there")
        raise DataError(f"{file}: no such file or folder; {_neighbours(file)}")
    if file.suffix not in _READERS:
        raise DataError(f"{file}: unknown suffix '{file.suffix}'; use {_SUFFIXES}")
    return _READERS[file.suffix]


def _neighbours(file: Path) -> str:
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}"
    others = {other.name: other for other in sorted(file.parent.iterdir()) if _is_data(other)}
    similar = [others[name] for name in get_close_matches(file.name, others, n=5)] or list(others.values())
    return f"{file.parent.resolve()} has {_listed(similar) if similar else f'no {_SUFFIXES} file'}"


def _listed(files: Sequence[Path]) -> str:
    names = [file.name for file in files[:5]]
    return ", ".join(names) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
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
    for number, line in _lines(file):
        if text := line.strip():
            row = _parse_json(text, file=file, line=number)
            _check_surrogates(row, text=text, place=f"{file}:{number}")
            yield _checked_row(row, place=f"{file}:{number}")


def _read_json(file: Path) -> Iterator[Row]:
    """A list of objects, or JSON lines under the suffix `.json`."""
    text = "".join(line for _, line in _lines(file))
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
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
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
        raise DataError(f"{file}: not a valid Parquet file ({_first_line(error)})") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_SUFFIXES = ".jsonl, .json, .csv or .parquet"


def _load_hub(config: DataSetConfig, *, offline: bool) -> Rows:
    import datasets

    try:
        with _hub_offline(offline):
            rows = datasets.load_dataset(
                config.path, config.name, split=config.split or "train", revision=config.revision
            )
    except (ConnectionError, FileNotFoundError) as error:
        reason = "run.offline forbids a download" if offline else _first_line(error)
        raise DataError(
            f"{config.path}: no file or folder here, and not in the cache of Hub data sets; {reason}"
        ) from error
    except Exception as error:
        raise DataError(f"{config.path}: cannot be loaded from the Hub ({_first_line(error)})") from error
    if offline and config.revision is not None:
        _check_cached_revision(config.path, config.revision, files=[entry["filename"] for entry in rows.cache_files])
    if config.limit is not None:
        rows = rows.select(range(min(config.limit, len(rows))))
    return Rows(config.path, tuple(rows.column_names), rows)


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """The library knows offline mode only as a process-wide setting, read from the environment at import."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _check_cached_revision(path: str, revision: str, *, files: Iterable[str]) -> None:
    """Offline, the library takes the newest cached version whatever the revision; its folder names the commit."""
    commits = {Path(file).parent.name for file in files}
    if commits != {revision}:
        raise DataError(
            f"{path}: offline, revision '{revision}' is not the cached commit {', '.join(sorted(commits))}; "
            "write that commit, or leave revision out"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def row_places(config: DataSetConfig, indices: Sequence[int]) -> list[str]:
    """Where rows stand, reading the data again: `file:line` of JSON lines, else the file and the row, counted from 1.

    Raises:
        DataError: the data is not what it was when the rows were loaded.
    """
    if not exists(expanduser(config.path)):
        return [f"{config.path}, row {index + 1}" for index in indices]
    path, wanted, places = Path(expanduser(config.path)), set(indices), dict[int, str]()
    files = _files_of_folder(path, split=config.split) if path.is_dir() else [path]
    for index, place in enumerate(chain.from_iterable(_places(file) for file in files)):
        if index in wanted:
            places[index] = place
        if len(places) == len(wanted):
            return [places[index] for index in indices]
    raise DataError(f"{path}: has fewer rows than before")


def _places(file: Path) -> Iterator[str]:
    if file.suffix == ".jsonl":
        return (f"{file}:{number}" for number, line in _lines(file) if line.strip())
    return (f"{file}, row {number}" for number, _ in enumerate(_reader(file)(file), start=1))
