"""What is done to a run. Each attack starts processes of its own, and says what they are allowed to answer."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping

from scripts.torturing.damage import all_but_a_copy_damaged, damage_a_file, dead_leases, foreign_lease
from scripts.torturing.outcome import tree_digest
from scripts.torturing.process import BEFORE_THE_PROGRAM, TrainingProcess
from scripts.torturing.trial import BEFORE_HANDLERS, Loss, Trial

__all__ = ["ATTACKS"]

_FULL_DISK = (0, 1_000, 20_000, 100_000, None)
"""Bytes beyond which no file of the process can grow; None: no further line fits into metrics.jsonl."""


def kill(trial: Trial) -> None:
    """`kill -9` at a random moment."""
    with trial.process() as process:
        newest = next(iter(trial.intact()), None)
        with trial.nothing_lost():
            _kill_at_a_moment(trial, process, "kill -9")
        trial.check_where_it_went_on(process, newest)


def terminate(trial: Trial) -> None:
    """SIGTERM at a random moment."""
    _stop(trial, "SIGTERM", [signal.SIGTERM])


def interrupt(trial: Trial) -> None:
    """SIGINT at a random moment."""
    _stop(trial, "SIGINT", [signal.SIGINT])


def two_signals(trial: Trial) -> None:
    """A second signal up to 50 ms after the first."""
    _stop(trial, "two signals", trial.chance.choices([signal.SIGTERM, signal.SIGINT], k=2))


def full_disk(trial: Trial) -> None:
    """From a random moment on no file can grow beyond a size; what is on the disk stays."""
    with trial.process() as process, trial.nothing_lost():
        newest = next(iter(trial.intact()), None)
        if trial.wait_for_a_moment(process) and trial.hit("full disk", process):
            metrics = trial.run / "metrics.jsonl"
            limit = trial.chance.choice(_FULL_DISK)
            if limit is None:
                limit = metrics.stat().st_size + 50 if metrics.exists() else 0
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        trial.wait_for_the_end(process)
        trial.check(process, allowed=(0, 2))
        if process.exit_code == 2 and process.output.count("error: ") != 1:
            raise Loss(f"a full disk is not told in one line: {process.output[-2000:]}")
        trial.check_where_it_went_on(process, newest)


def second_process(trial: Trial) -> None:
    """Another process with the same command; the first one is held meanwhile, so that every byte can be compared."""
    with trial.process() as first, trial.nothing_lost():
        arrived = trial.wait_until_it_began(first) and trial.wait_for_a_moment(first)
        if arrived and trial.hit("second process", first) and first.hold():
            before = tree_digest(trial.run)
            with trial.process() as second:
                trial.wait_for_the_end(second)
                if tree_digest(trial.run) != before:
                    raise Loss(f"a second process touched the run: {second.output}")
                trial.check(second, allowed=(2,))
                if "in use by" not in second.output:
                    raise Loss(f"a second process was not told who is there: {second.output}")
            first.send(signal.SIGCONT)
        _kill_at_a_moment(trial, first, "kill -9")


def damaged_checkpoint(trial: Trial) -> None:
    """A file of the newest checkpoint is cut, changed or gone: the run says so and goes on from the one before."""
    if not _train_until(trial, checkpoints=2):
        return
    newest, older = trial.intact()[:2]
    what = damage_a_file(newest, trial.chance)
    trial.remember_damage(newest)
    with trial.process() as process:
        if trial.wait_until_it_began(process):
            trial.hits.append((f"damaged checkpoint ({what.kind})", what.part))
        if f"checkpoint skipped: runs/run/checkpoints/{newest.name}: " not in process.output:
            raise Loss(f"{what} in {newest.name} was not named: {process.output}")
        trial.check_where_it_went_on(process, older)
        _kill_at_a_moment(trial, process, "kill -9")


def all_damaged(trial: Trial) -> None:
    """No checkpoint is intact: the run refuses to start over, and goes on when one is put back."""
    if not _train_until(trial, checkpoints=1):
        return
    intact = trial.intact()
    with all_but_a_copy_damaged(intact, trial.chance, aside=trial.folder / "copy"):
        trial.remember_damage(*intact[1:])
        before = tree_digest(trial.run / "checkpoints")
        with trial.process() as process:
            trial.wait_for_the_end(process)
            trial.check(process, allowed=(2,))
            if "no checkpoint is intact" not in process.output or tree_digest(trial.run / "checkpoints") != before:
                raise Loss(f"a run without an intact checkpoint was not refused: {process.output}")
        trial.hits.append(("all checkpoints damaged", "between processes"))
    kill(trial)


def stale_lease(trial: Trial) -> None:
    """The lease of a process that is no more: the run is taken over."""
    name, lease = trial.chance.choice(list(dead_leases().items()))
    _take_over(trial, lease, name)


def living_lease(trial: Trial) -> None:
    """The lease of another machine that gave a sign of life just now: refused; three minutes later: taken over."""
    trial.run.mkdir(parents=True, exist_ok=True)
    (trial.run / ".lease.json").write_text(foreign_lease(), encoding="utf-8")
    with trial.process() as process:
        trial.wait_for_the_end(process)
        trial.check(process, allowed=(2,))
        if "in use by process 1 on another-machine" not in process.output:
            raise Loss(f"a living lease was not respected: {process.output}")
    _take_over(trial, foreign_lease(), "another machine's", age=200)


ATTACKS: Mapping[str, Callable[[Trial], None]] = {
    attack.__name__: attack
    for attack in (
        kill,
        terminate,
        interrupt,
        two_signals,
        full_disk,
        second_process,
        damaged_checkpoint,
        all_damaged,
        stale_lease,
        living_lease,
    )
}


def _kill_at_a_moment(trial: Trial, process: TrainingProcess, name: str) -> None:
    if trial.wait_for_a_moment(process) and trial.hit(name, process):
        process.send(signal.SIGKILL)
    trial.wait_for_the_end(process)
    trial.check(process, allowed=(0, -signal.SIGKILL))


def _stop(trial: Trial, name: str, signals: list[signal.Signals]) -> None:
    with trial.process() as process, trial.nothing_lost():
        newest = next(iter(trial.intact()), None)
        allowed, place = {0, 75}, None
        if trial.wait_for_a_moment(process) and (place := trial.hit(name, process)):
            for number, following in enumerate(signals):
                if number > 0:
                    time.sleep(trial.chance.uniform(0, 0.05))
                allowed |= set() if process.handles_signals else set(BEFORE_HANDLERS)
                process.send(following)
        trial.wait_for_the_end(process)
        if trial.is_finished():  # so close to the end that there was nothing to stop
            allowed |= set(BEFORE_HANDLERS)
        uncaught = place == BEFORE_THE_PROGRAM and signal.SIGINT in signals
        trial.check(process, allowed=allowed | ({1} if uncaught else set()), traceback=uncaught)
        if process.exit_code == 75 and "to go on, train run again with the same settings" not in process.output:
            raise Loss(f"a stopped run does not say how to go on: {process.output[-2000:]}")
        trial.check_where_it_went_on(process, newest)


def _train_until(trial: Trial, *, checkpoints: int) -> bool:
    """A killed process, if it takes one, that leaves at least so many intact checkpoints; False: it finished."""
    if len(trial.intact()) < checkpoints:
        with trial.process() as process:
            if trial.wait_for_checkpoints(process, checkpoints) and trial.hit("kill -9", process):
                process.send(signal.SIGKILL)
            trial.wait_for_the_end(process)
            trial.check(process, allowed=(0, -signal.SIGKILL))
    return not trial.is_finished()


def _take_over(trial: Trial, lease: str, name: str, *, age: float = 0.0) -> None:

    trial.run.mkdir(parents=True, exist_ok=True)
    file = trial.run / ".lease.json"
    file.write_text(lease, encoding="utf-8")
    os.utime(file, (time.time() - age, time.time() - age))
    with trial.process() as process, trial.nothing_lost():
        if trial.wait_until_it_began(process) and "taken over from" not in process.output:
            raise Loss(f"{json.dumps(lease)} was not taken over: {process.output}")
        trial.hits.append((f"lease ({name})", "between processes"))
        _kill_at_a_moment(trial, process, "kill -9")
