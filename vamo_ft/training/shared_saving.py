"""Checkpoints of several processes, which all know whether one was saved, and go on from the same."""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.core.protocols import Runtime, StateDict
from vamo_ft.training.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from vamo_ft.training.disk import disk_error
from vamo_ft.training.state_files import split_state, write_parts

__all__ = ["VISIBLE_SECONDS", "newest_together", "open_written", "save_together"]

VISIBLE_SECONDS = 90.0
"""After which a network file system shows what another machine has written."""

WriteOthers = Callable[[Path], None]
"""Has the other processes write their parts into a folder, and returns when they have."""


def save_together(runtime: Runtime, owners: Mapping[str, StateDict], save: Callable[[WriteOthers], object]) -> None:
    """One checkpoint of all processes: the main one saves, and at its call the others add the parts that they hold.

    Collective. Where all hold the same the others only wait for the outcome: one that takes a checkpoint for saved that
    is not would be out of step at the next try.

    Args:
        owners: name -> state tree.
        save: is called in the main process.

    Raises:
        SaveError: the same in all processes.
    """
    if runtime.is_main:
        _lead(runtime, save)
    else:
        _follow(runtime, owners)


def _lead(runtime: Runtime, save: Callable[[WriteOthers], object]) -> None:
    called, failure = False, None

    def write_others(folder: Path) -> None:
        nonlocal called
        if runtime.share[1] == 1:
            return
        called = True
        runtime.agreed(str(folder.absolute()))
        if runtime.any(False):
            raise SaveError(f"{folder}: another process could not write its part of the checkpoint")

    try:
        save(write_others)
    except SaveError as error:
        failure = error
    if not called:
        runtime.agreed(None)
    runtime.agreed(None if failure is None else str(failure))
    if failure is not None:
        raise failure


def _follow(runtime: Runtime, owners: Mapping[str, StateDict]) -> None:
    if (folder := runtime.agreed(None)) is not None:
        failed = False
        try:
            for owner, state in owners.items():
                write_parts(Path(folder), owner, split_state(owner, state), rank=runtime.share[0])
        except Exception as error:
            if disk_error(error) is None:
                raise
            failed = True
        runtime.any(failed)
    if (message := runtime.agreed(None)) is not None:
        raise SaveError(message)


def newest_together(runtime: Runtime, root: Path) -> Checkpoint | None:
    """The newest intact checkpoint in `root` that the main process sees, opened by every process; collective.

    Raises:
        DataError: this process does not see it.
    """
    found = newest_checkpoint(root) if runtime.is_main else None
    name = runtime.agreed(None if found is None else found.path.name)
    return found if runtime.is_main or name is None else open_written(root / name)


def open_written(path: Path) -> Checkpoint:
    """A checkpoint that the main process has opened; waits `VISIBLE_SECONDS` for it to be seen as a whole.

    Raises:
        DataError: it is not; names this machine.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            return open_checkpoint(path)
        except DataError as error:
            if time.monotonic() >= deadline:
                raise DataError(f"on {socket.gethostname()}, unlike for the first process: {error}") from None
        time.sleep(1.0)
