"""Experiment trackers beside metrics.jsonl: they get what is written there, and never hold up or end a run."""

import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

__all__ = ["Tracker", "Trackers"]

_log = logging.getLogger("vamo_ft")

_WAITING = 10_000
_SECONDS_AT_END = 30.0
_SECONDS_AT_STOP = 3.0  # who stops a run may not wait long before it is killed


class Tracker(Protocol):
    """One client. All of its methods are called from one thread of its own, and any of them may fail or block."""

    @property
    def name(self) -> str:
        """As in `logging.trackers`."""

    def go_on(self, step: int | None) -> int | None:
        """Opens the tracker's run, or goes back in the one that is open; called before anything is logged.

        Args:
            step: the training goes on after this one, of which everything was logged; None: it begins anew, under
                another id.

        Returns:
            The last step that is shown already and cannot be taken back, so that it and what is before it is not to be
            logged again; None: there is none.
        """

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Shows figures of a step."""

    def finish(self, *, exit_code: int) -> None:
        """Closes the tracker's run; `exit_code` is that of the program."""


class Trackers:
    """Hands every record to all trackers, each in a thread of its own.

    A tracker that fails is warned of once, and goes on with the next record; one that cannot be opened is left out, and
    one that cannot keep up loses records. At the end of the block they get half a minute for what is left, and three
    seconds where the run ends early.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._workers = [_Worker(tracker) for tracker in trackers]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = 0 if error is None else getattr(error, "exit_code", 1)
        for worker in self._workers:
            worker.end(exit_code=code)
        for worker in self._workers:
            worker.join(_SECONDS_AT_END if code == 0 else _SECONDS_AT_STOP)

    def go_on(self, step: int | None) -> None:
        """Says where the training is about to begin; see `Tracker.go_on`."""
        for worker in self._workers:
            worker.go_on(step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes a record of metrics.jsonl; its events and what is not a finite number are left out."""
        if "event" in record or not self._workers:
            return
        values = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for worker in self._workers:
            worker.log(values, step=record["step"])


class _Worker:
    """Calls one tracker from a thread that does not keep the process alive."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._open = False
        self._shown: int | None = None
        self._warned = False

    def go_on(self, step: int | None) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._tracker.name, daemon=True)
            self._thread.start()
        self._put(lambda: self._go_on(step))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._put(lambda: self._log(values, step=step))

    def end(self, *, exit_code: int) -> None:
        self._put(lambda: self._finish(exit_code=exit_code))
        self._put(None)

    def join(self, seconds: float) -> None:
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            _log.warning(
                "logging.trackers: %s is not done after %.0f s; what it has not sent is lost to it, and is in "
                "metrics.jsonl",
                self._tracker.name,
                seconds,
            )

    def _put(self, job: Callable[[], None] | None) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._warn("it cannot keep up")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # whatever a client or its server does, the run is more important
                self._warn(f"{type(error).__name__}: {error}")

    def _go_on(self, step: int | None) -> None:
        self._open = False
        self._shown = self._tracker.go_on(step)
        self._open = True

    def _log(self, values: Mapping[str, float], *, step: int) -> None:
        if self._open and (self._shown is None or step > self._shown):
            self._tracker.log(values, step=step)

    def _finish(self, *, exit_code: int) -> None:
        if self._open:
            self._tracker.finish(exit_code=exit_code)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            _log.warning(
                "logging.trackers: %s fails (%s); the run goes on, and metrics.jsonl has everything",
                self._tracker.name,
                " ".join(reason.split()),
            )
        self._warned = True
