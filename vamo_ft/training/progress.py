"""Progress bars on a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vamo_ft.core.protocols import ProgressTask

__all__ = ["ConsoleProgress", "SilentProgress"]

_log = logging.getLogger("vamo_ft")

_SECONDS_BETWEEN_LINES = 10.0


class ConsoleProgress:
    """Bars that can run inside each other; when the console is no terminal, a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._interactive = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._open = 0

    @contextmanager
    def task(self, description: str, total: int, *, done: int = 0) -> Iterator[ProgressTask]:
        """A bar of `total` units, `done` of them behind us; it disappears at the end of the block."""
        if not self._interactive:
            yield _PlainTask(description, total, done)
            return
        if self._open == 0:
            self._bars.start()
        self._open += 1
        bar = self._bars.add_task(description, total=total, completed=done, note="")
        try:
            yield _Bar(self._bars, bar)
        finally:
            self._bars.remove_task(bar)
            self._open -= 1
            if self._open == 0:
                self._bars.stop()


class SilentProgress:
    """Shows nothing, for what runs many times within something that shows its own progress."""

    @contextmanager
    def task(self, description: str, total: int, *, done: int = 0) -> Iterator[ProgressTask]:
        """A task that nobody sees."""
        yield _SilentTask()


class _SilentTask:
    def advance(self, amount: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Bar:
    def __init__(self, bars: Progress, bar: TaskID) -> None:
        self._bars = bars
        self._bar = bar

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._bar, amount)

    def note(self, text: str) -> None:
        self._bars.update(self._bar, note=text)


class _PlainTask:
    def __init__(self, description: str, total: int, done: int) -> None:
        self._description = description
        self._total = total
        self._done = done
        self._shown = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            _log.info("%s: %d of %d", self._description, self._done, self._total)

    def note(self, text: str) -> None:
        pass
