"""Where metrics go: one JSON object a line."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["MetricsWriter", "finite"]

_log = logging.getLogger("vamo_ft")


class MetricsWriter:
    """Appends records to `metrics.jsonl`.

    Every line is standard JSON, which has no word for NaN and infinity: numbers that are not finite become null. A
    line reaches the operating system when it is written, and the disk at `flush`. Where it cannot be written, on a full
    disk, it waits in memory for the next one, with a warning; the file never ends within a line.

    Args:
        listeners: are given every record too.
    """

    def __init__(self, path: Path, *, listeners: Sequence[Callable[[Mapping[str, Any]], None]] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []
        self._failed = False
        self._listeners = listeners

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def length(self) -> int:
        """Bytes of all records so far; what a checkpoint keeps for `truncate_to`."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        self._waiting.append(line.encode())
        self._write_waiting()
        for listener in self._listeners:
            listener(record)

    def flush(self) -> None:
        """Makes what was written durable, as far as the disk has room."""
        self._write_waiting()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def _write_waiting(self) -> None:
        while self._waiting:
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

        What is cut off is appended to `metrics.discarded.jsonl` beside it first. A file that is shorter than `length`
        is left as it is, with a warning.
        """
        surplus = self.length - length
        if surplus < 0:
            _log.warning("%s: %d bytes shorter than the checkpoint says; lines were lost", self._path, -surplus)
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

    def close(self) -> None:
        """Flushes and closes the file; lines for which there is no room are lost, with a warning."""
        self.flush()
        if self._waiting:
            _log.warning("%s: %d lines could not be written and are lost", self._path, len(self._waiting))
        self._file.close()


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
