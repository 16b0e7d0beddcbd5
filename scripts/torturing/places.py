"""Where in its work a process is, as its own stack tells when it is asked."""

import faulthandler
import os
import re
import signal
from pathlib import Path

__all__ = ["PLACE_FILE", "STACK_BEGINS", "place_of", "watch", "watch_as_told"]

PLACE_FILE = "TORTURE_PLACE_FILE"
"""Environment variable: where a process writes its stack."""

STACK_BEGINS = "(most recent call first):"
"""Above every stack in that file."""

_FRAME = re.compile(r'File ".*/vamo_ft/([\w/]+\.py)", line \d+ in (\w+)')
_PLACES = (  # file and function of the innermost frame that matches -> what the run is doing
    (r"training/checkpoint\.py (save_checkpoint|discard_later)", "save"),
    (r"training/checkpoint\.py (open|newest)_checkpoint", "preparation"),
    (r"commands/finish\.py save_final_model", "final model"),
    (r"training/evaluation\.py \w+", "evaluation"),
    (r"estimators/\w+\.py (prepare|complete)", "snapshot"),
    (r"training/trainer\.py _step", "step"),
    (r"training/trainer\.py train", "between steps"),
    (r"commands/train\.py \w+", "preparation"),
    (r"cli\.py run", "imports"),
)


def watch(path: Path) -> None:
    """From now on SIGUSR1 makes this process add its stack to `path`, which exists once that works."""
    unready = path.with_suffix(".unready")
    file = unready.open("w", encoding="utf-8")  # faulthandler keeps it
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
    unready.rename(path)


def watch_as_told() -> None:
    """`watch` the file that the environment names, if it does."""
    if (path := os.environ.get(PLACE_FILE)) is not None:
        watch(Path(path))


def place_of(stack: str) -> str | None:
    """What a run with this stack, innermost frame first, is doing; None outside of the program."""
    for file, function in _FRAME.findall(stack):
        for pattern, place in _PLACES:
            if re.fullmatch(pattern, f"{file} {function}"):
                return place
    return None
