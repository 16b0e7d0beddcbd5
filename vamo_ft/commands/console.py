"""Where log lines go: the terminal, and the run's log.txt."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from vamo_ft.commands.secrets import SecretsFilter

__all__ = ["logging_to"]


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
    if console.is_terminal:
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
