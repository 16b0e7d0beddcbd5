"""The process: `vamo-ft`, and `python -m vamo_ft`, the form that `accelerate launch -m` and `torchrun -m` need."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

__all__ = ["main"]

_INTERRUPTED = 130
_TERMINATED = 143


def main() -> NoReturn:
    """Runs the command that the process was started with, and exits with its code; Ctrl-C is one word at any time."""
    if os.getpid() == 1:  # in a container the kernel drops a SIGTERM for which its first process has no handler
        signal.signal(signal.SIGTERM, _end)
    try:
        from vamo_ft.cli import main as run_command

        run_command()
    except KeyboardInterrupt:  # before or after the command
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    sys.exit(_TERMINATED)


if __name__ == "__main__":
    main()
