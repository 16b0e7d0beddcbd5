"""Where log lines go: the terminal, and the run's log.txt."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOBase
from pathlib import Path
from typing import IO, TextIO, cast

from rich.console import Console
from rich.logging import RichHandler

from vamo_ft.commands.secrets import SecretsFilter

__all__ = ["logging_to", "output_console", "patient_console"]


def output_console(width: int) -> Console:
    """Standard output for tables: as wide as the terminal, up to `width`, and so wide elsewhere."""
    console = Console()
    return console if console.is_terminal and console.width <= width else Console(width=width)


class _Patient(TextIOBase):
    """Passes text on as long as somebody reads it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a stream that is closed is a ValueError
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def patient_console(stream: TextIO) -> Console:
    """A console on `stream` for what must go on when its reader is gone, such as `head` or a lost terminal."""
    return Console(file=cast(IO[str], _Patient(stream)))


class _LogFile(logging.FileHandler):
    """Loses lines on a full disk, which is told by what has to be saved and not by a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(console: Console, *, file: Path | None = None, quiet: bool = False) -> Iterator[None]:
    """Within the block the program's log goes to `console`, and with dates to `file`; secrets are masked.

    Args:
        quiet: the console shows warnings only.
    """
    logger = logging.getLogger("vamo_ft")
    handlers: list[logging.Handler]
    if console.quiet:
        handlers = [logging.NullHandler()]
    elif console.is_terminal:
        handlers = [RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S")]
    else:
        handlers = [logging.StreamHandler(console.file)]
    if quiet:
        handlers[0].setLevel(logging.WARNING)
    if file is not None:
        handlers.append(_LogFile(file, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.addFilter(SecretsFilter())
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = True
