"""SIGTERM and SIGINT as a question the training loop asks."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

__all__ = ["StopSignals"]


class StopSignals:
    """While entered, SIGTERM and SIGINT set a flag instead of ending the process.

    A second signal changes nothing, so that it cannot interrupt the checkpoint that the first one asked for. Only the
    main thread can install handlers; entered in another thread, this does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """The first signal that came, such as "SIGTERM"; None before."""
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # A handler that was not installed from Python reads as None and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
