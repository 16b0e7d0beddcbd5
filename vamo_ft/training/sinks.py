"""Where metrics go: one JSON object a line."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from vamo_ft.core.errors import SaveError

__all__ = ["Metrics", "MetricsWriter", "NoMetrics", "finite"]

_log = logging.getLogger("vamo_ft")


class Metrics(Protocol):
    """Takes the records of a run; see `MetricsWriter`."""

    @property
    def length(self) -> int:
        """Bytes of all records so far."""

    @property
    def waiting(self) -> list[str]:
        """Lines for which there was no room yet."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""

    def write_lines(self, lines: Iterable[str]) -> None:
        """Appends lines as they are."""

    def flush(self) -> None:
        """Makes what was written durable."""

    def truncate_to(self, length: int) -> None:
        """Goes back to `length` bytes."""


class NoMetrics:
    """Of a process that leaves the records to another one (implements `Metrics`)."""

    length = 0

    @property
    def waiting(self) -> list[str]:
        """None."""
        return []

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_lines(self, lines: Iterable[str]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def truncate_to(self, length: int) -> None:
        """Nothing."""


class MetricsWriter:
    """Appends records to `metrics.jsonl`.

    Every line is standard JSON, which has no word for NaN and infinity: numbers that are not finite become null. A
    line reaches the operating system when it is written, and the disk at `flush`. Where it cannot be written, on a full
    disk, it waits in memory for the next one, with a warning; the file never ends within a line. What waits belongs
    into a checkpoint, and what still waits at the end is an error, so that no line is lost.

    Args:
        listeners: are given every record too.
        check_held: asked before every write; raises where the file is another process's by now.
    """

    def __init__(
        self,
        path: Path,
        *,
        listeners: Sequence[Callable[[Mapping[str, Any]], None]] = (),
        check_held: Callable[[], None] = lambda: None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._check_held = check_held
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []
        self._failed = False
        self._listeners = listeners

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()
        self._file.close()
        if self._waiting and error is None:
            raise SaveError(
                f"{self._path}: no room for its last {len(self._waiting)} lines; the checkpoints stay: make room, and "
                "train again with the same settings to go on"
            )

    @property
    def length(self) -> int:
        """Bytes of all records so far; what a checkpoint keeps for `truncate_to`."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def waiting(self) -> list[str]:
        """Lines for which there was no room yet."""
        return [line.decode() for line in self._waiting]

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        self.write_lines([json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"])
        for listener in self._listeners:
            listener(record)

    def write_lines(self, lines: Iterable[str]) -> None:
        """Appends lines as they are, such as those that were `waiting` when a checkpoint was saved."""
        self._waiting += [line.encode() for line in lines]
        self._write_waiting()

    def flush(self) -> None:
        """Makes what was written durable, as far as the disk has room."""
        self._write_waiting()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def _write_waiting(self) -> None:
        while self._waiting:
            self._check_held()
            length = self.length
            try:
                rest = self._waiting[0]
                while rest:  # a disk with room for a part takes that, and says at the next write that it is full
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                self._file.truncate(length)
                self._warn(error)
                return
            del self._waiting[0]
            self._failed = False

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            _log.warning("%s: cannot be written (%s); lines wait until there is room", self._path, error.strerror)
        self._failed = True

    def truncate_to(self, length: int) -> None:
        """Goes back to `length` bytes, as a resume does, so that no step is in the file twice.

        What is cut off is appended to `metrics.discarded.jsonl` beside it first, and what waits is forgotten. A file
        that is shorter than `length` is left as it is, up to its last whole line, with a warning.
        """
        self._waiting.clear()
        surplus = self.length - length
        if surplus < 0:
            _log.warning("%s: %d bytes shorter than the checkpoint says; lines were lost", self._path, -surplus)
            with self._path.open("rb") as source:
                self._file.truncate(source.read().rfind(b"\n") + 1)
        if surplus <= 0:
            return
        discarded = self._path.with_name(f"{self._path.stem}.discarded{self._path.suffix}")
        with self._path.open("rb") as source, discarded.open("ab") as target:
            source.seek(length)
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
        self._file.truncate(length)
        self.flush()


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
