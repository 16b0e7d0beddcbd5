"""A run under attack: what has to hold whatever is done to it."""

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.torturing.cases import NUM_STEPS, run_directory
from scripts.torturing.outcome import read_status
from scripts.torturing.process import TrainingProcess

__all__ = ["BEFORE_HANDLERS", "Loss", "Trial"]

BEFORE_HANDLERS = (-signal.SIGTERM, -signal.SIGINT, 130)
"""Exit codes of a signal that comes before a process has work to save, or after it has finished."""

_PATIENCE_SECONDS = 400.0
_REAL_START_EVERY = 4
_START_SECONDS = {True: 8.0, False: 1.5}
_CHECKPOINT = re.compile(r"(?:\.replaced-)?step-(\d{8})")
_BAD_WORDS = ("Traceback", "unexpected error", "Logging error", "Exception ignored")


class Loss(Exception):
    """A promise was broken."""


class Trial:
    """One run, from its first process to the one that finishes it.

    Args:
        folder: of its own.
        chance: decides everything that is random, apart from what the machine's speed makes of it.
        first_start: which of the processes are started from scratch: the `first_start`-th, and every fourth from there.
    """

    def __init__(self, folder: Path, config: Path, *, chance: random.Random, first_start: int) -> None:
        self.folder = folder
        self.run = run_directory(folder)
        self.chance = chance
        self.hits: list[tuple[str, str]] = []
        """What was done, and where in its work the process was."""
        self.processes = 0
        self.starts: Counter[str] = Counter()
        self._damaged: set[tuple[int, int]] = set()
        self._config = config
        self._next_start = first_start

    @contextmanager
    def process(self) -> Iterator[TrainingProcess]:
        """A process, which is gone after the block; a running one stays as it is before `check`."""
        from_scratch = (self.processes - self._next_start) % _REAL_START_EVERY == 0
        self.processes += 1
        self.starts["started from scratch" if from_scratch else "forked"] += 1
        process = TrainingProcess(self.folder, self._config, from_scratch=from_scratch)
        try:
            yield process
        finally:
            process.end()
            with (self.folder / "output.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- process {self.processes}\n{process.output}--- exit code {process.exit_code}\n")

    def is_finished(self) -> bool:
        """Whether status.json says so."""
        status = read_status(self.run)
        return status is not None and status["state"] == "finished"

    def intact(self) -> list[Path]:
        """Checkpoints that were not damaged here, newest first."""
        found = [path for path in (self.run / "checkpoints").glob("*") if _CHECKPOINT.fullmatch(path.name)]
        kept = [path for path in found if _identity(path) not in self._damaged]
        return sorted(kept, key=lambda path: (step_of(path), path.name), reverse=True)

    def remember_damage(self, *checkpoints: Path) -> None:
        """Of checkpoints that were damaged on purpose, under whatever name they are found later."""
        self._damaged |= set(map(_identity, checkpoints))

    def newest_step(self) -> int:
        """Of the newest intact checkpoint; 0 where there is none."""
        return max(map(step_of, self.intact()), default=0)

    def hit(self, name: str, process: TrainingProcess) -> str | None:
        """Notes an attack and where the process is; None: it has ended, and there is nothing to attack."""
        place = process.place()
        if not process.is_running():
            return None
        self.hits.append((name, place))
        return place

    def wait_until_it_began(self, process: TrainingProcess) -> bool:
        """Until training begins; False if the process ended first."""
        return self._wait(process, lambda: process.began)

    def wait_for_a_moment(self, process: TrainingProcess) -> bool:
        """Until a random moment: while it starts, while it trains, in a save, or at its end.

        Returns:
            False: the process ended first.
        """
        match self.chance.choices(["start", "training", "save", "end"], [2, 7, 2, 1])[0]:
            case "start":
                seconds = self.chance.uniform(0, _START_SECONDS[process.from_scratch])
                return self._wait(process, lambda: process.seconds > seconds)
            case "training":
                return self._wait_for_step(process) and self._pause(process, 0.2)
            case "save":
                saving = self._wait_for_step(process) and self._wait(process, self._is_saving)
                return saving and self._pause(process, 0.03)
            case _:
                model = self.run / "model"
                saving = self._wait(process, lambda: model.exists() or model.with_name(".model.tmp").exists())
                return saving and self._pause(process, 0.1)

    def wait_for_checkpoints(self, process: TrainingProcess, count: int) -> bool:
        """Until there are so many."""
        return self._wait(process, lambda: len(self.intact()) >= count)

    def wait_for_the_end(self, process: TrainingProcess) -> None:
        """Until the process has ended."""
        self._wait(process, lambda: False)

    def check(self, process: TrainingProcess, *, allowed: Collection[int], traceback: bool = False) -> None:
        """What has to hold after a process has ended.

        Args:
            allowed: exit codes.
            traceback: whether it may show one: before the program's first line runs there is nobody to catch it.

        Raises:
            Loss: it does not hold.
        """
        if process.exit_code not in allowed:
            raise Loss(f"exit code {process.exit_code} instead of {sorted(allowed)}: {process.output[-500:]}")
        if not traceback and (bad := [word for word in _BAD_WORDS if word in process.output]):
            raise Loss(f"{bad[0]!r} was shown: {process.output[-2000:]}")

    @contextmanager
    def nothing_lost(self) -> Iterator[None]:
        """Raises a `Loss` if the newest intact checkpoint is older after the block than before."""
        before = self.newest_step()
        yield
        if (after := self.newest_step()) < before:
            raise Loss(f"the checkpoint of step {before} is gone, the newest is of step {after}")

    def check_where_it_went_on(self, process: TrainingProcess, expected: Path | None) -> None:
        """Raises a `Loss` unless a process that began went on from the checkpoint `expected`."""
        if (
            expected is not None
            and process.began
            and f"going on from runs/run/checkpoints/{expected.name}" not in (process.output)
        ):
            raise Loss(f"it did not go on from {expected.name}: {process.output[:2000]}")

    def _is_saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".tmp-*"))

    def _wait_for_step(self, process: TrainingProcess) -> bool:
        first = self.newest_step()
        target = first + self.chance.uniform(0, 0.8) * (NUM_STEPS - first)
        return self._wait(process, lambda: process.step >= target)

    def _pause(self, process: TrainingProcess, longest: float) -> bool:
        until = process.seconds + self.chance.uniform(0, longest)
        return self._wait(process, lambda: process.seconds > until)

    def _wait(self, process: TrainingProcess, condition: Callable[[], bool]) -> bool:
        while process.is_running():
            if condition():
                return True
            if process.seconds > _PATIENCE_SECONDS:
                raise Loss(f"it hangs: {process.place()} after {process.seconds:.0f} s: {process.output[-500:]}")
            time.sleep(0.0005)
        return False


def _identity(checkpoint: Path) -> tuple[int, int]:
    """Of a folder, which keeps it when it is renamed; a number alone is given again to a later one."""
    status = checkpoint.stat()
    return status.st_ino, status.st_mtime_ns


def step_of(checkpoint: Path) -> int:
    """From its name."""
    return int(checkpoint.name[-8:])
