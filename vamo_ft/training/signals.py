"""SIGTERM, SIGINT and a time limit as a question the training loop asks."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

__all__ = ["StopSignals"]


class StopSignals:
    """While entered, SIGTERM and SIGINT set a flag instead of ending the process.

    A second signal changes nothing, so that it cannot interrupt the checkpoint that the first one asked for. Only the
    main thread can install handlers; entered in another thread, this does nothing.

    Args:
        max_seconds: asks for a stop this long after now, too; None: no limit.
        last: this is the last work of the process. After a signal more of them are ignored to its end, since one that
            came between the last line and the exit would change the exit code.
    """

    def __init__(self, *, max_seconds: float | None = None, last: bool = False) -> None:
        self.name: str | None = None
        """The first signal that came, such as "SIGTERM"; None before."""
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._late = False
        self._last = last

    def requested(self) -> bool:
        """Whether a signal has come, or the time is up."""
        if self._deadline is not None and not self._late and self.name is None:
            self._late = time.monotonic() >= self._deadline
        return self.name is not None or self._late

    @property
    def cause(self) -> str | None:
        """What asked for the stop first: a signal's name, or "time limit"; None before."""
        return "time limit" if self._late else self.name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._last and self.cause is not None:
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)
            return
        for number, handler in self._previous.items():
            # A handler that was not installed from Python reads as None and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
