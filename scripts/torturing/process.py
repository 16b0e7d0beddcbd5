"""One process of `vamo-ft train`, watched from outside."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from scripts.torturing.cases import run_directory
from scripts.torturing.outcome import read_status
from scripts.torturing.places import PLACE_FILE, STACK_BEGINS, place_of, watch

__all__ = ["BEFORE_THE_PROGRAM", "ENVIRONMENT", "ROOT", "TrainingProcess", "load_what_training_needs"]

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # sums depend on the number of threads
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",  # under a full disk Python would leave half a file among its modules
    "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts" / "torturing" / "site"), str(ROOT)]),
}
"""Of every process that trains."""

BEFORE_THE_PROGRAM, AFTER_THE_PROGRAM = "start of Python", "end of Python"

_STEP = re.compile(r"^step (\d+) of ", re.MULTILINE)
_BEGAN = re.compile(r"^[a-z_]+: [\d,]+ trainable of ", re.MULTILINE)
_LOOK_SECONDS = 0.5


class TrainingProcess:
    """`vamo-ft train CONFIG` in a folder of its own.

    Args:
        folder: the working directory.
        from_scratch: start the interpreter and `python -m vamo_ft`. Otherwise this process forks, which has loaded the
            libraries already and saves the seconds of that; what the two do from there on is the same.
    """

    def __init__(self, folder: Path, config: Path, *, from_scratch: bool) -> None:
        self.from_scratch = from_scratch
        self.output = ""
        self.exit_code: int | None = None
        self._run = run_directory(folder)
        self._status_before = _identity(self._run / "status.json")
        self._place = folder / f"place-{time.monotonic_ns()}"
        self._began = time.monotonic()
        reading, writing = os.pipe()
        arguments = ["train", str(config)]
        self.pid = os.fork()
        if self.pid == 0:
            _train(folder, arguments, writing, self._place, from_scratch=from_scratch)
        os.close(writing)
        os.set_blocking(reading, False)
        self._pipe: int | None = reading

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    @property
    def began(self) -> bool:
        """Whether everything is loaded and training begins."""
        return _BEGAN.search(self.output) is not None

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before."""
        steps = _STEP.findall(self.output)
        return int(steps[-1]) if steps else 0

    @property
    def handles_signals(self) -> bool:
        """Whether it has got so far that a signal makes it stop with a checkpoint, as its status.json tells."""
        status = read_status(self._run)
        replaced = _identity(self._run / "status.json") != self._status_before
        return replaced and status is not None and status["state"] == "running"

    def is_running(self) -> bool:
        """Whether it has not ended; reads what it says meanwhile."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._read()
            if pid != 0:
                self._ended(status)
        return self.exit_code is None

    def hold(self) -> bool:
        """Stops all its threads until SIGCONT; False if it has ended."""
        self.send(signal.SIGSTOP)
        if self.exit_code is None:
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                self._ended(status)
        return self.exit_code is None

    def send(self, number: signal.Signals) -> None:
        """A signal; nothing if it has ended. Its number cannot be another's: only `is_running` lets it go."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def place(self) -> str:
        """What it is doing."""
        try:
            told = self._place.stat().st_size
        except FileNotFoundError:
            return BEFORE_THE_PROGRAM
        until = time.monotonic() + _LOOK_SECONDS
        while time.monotonic() < until and self.is_running():
            self.send(signal.SIGUSR1)
            time.sleep(0.001)
            _, *stacks = self._place.read_bytes()[told:].decode().split(STACK_BEGINS)
            if stacks and (place := place_of(stacks[0])) is not None:
                return place
            if len(stacks) > 1:  # written frame by frame, and so complete only when the next one begins
                return AFTER_THE_PROGRAM if self.began else BEFORE_THE_PROGRAM
        return "not seen"

    def end(self) -> None:
        """Kills it if it is still there, and forgets where it was."""
        if self.is_running():
            self.send(signal.SIGKILL)
            while self.is_running():
                time.sleep(0.001)
        for path in (self._place, self._place.with_suffix(".unready")):
            path.unlink(missing_ok=True)

    def _ended(self, status: int) -> None:
        self._read()
        self.exit_code = os.waitstatus_to_exitcode(status)
        self._close()

    def _read(self) -> None:
        while self._pipe is not None:
            try:
                text = os.read(self._pipe, 1 << 16)
            except BlockingIOError:
                return
            if not text:
                self._close()
            self.output += text.decode(errors="replace")

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


def load_what_training_needs() -> None:
    """Imports it, so that a fork need not; nothing is run, since threads would not survive the fork."""
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import vamo_ft.commands.settings
    import vamo_ft.commands.train  # noqa: F401


def _train(folder: Path, arguments: Sequence[str], output: int, place: Path, *, from_scratch: bool) -> NoReturn:
    """What the new process does. It never returns: what comes next is its parent's."""
    code = 1
    try:
        os.setsid()  # what a terminal sends to this program's group is not meant for it
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDWR)
        for source, target in ((nothing, 0), (nothing, 1), (output, 2)):
            os.dup2(source, target)
        if from_scratch:
            os.execve(
                sys.executable,
                [sys.executable, "-m", "vamo_ft", *arguments],
                {**os.environ, PLACE_FILE: str(place)},
            )
        sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        watch(place)
        from vamo_ft.cli import main

        sys.argv = ["vamo-ft", *arguments]
        main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
