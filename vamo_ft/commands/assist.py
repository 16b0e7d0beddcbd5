"""The part that a process which is not the main one takes in `vamo-ft train`."""

import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vamo_ft.assemble import RunSurroundings, train_run
from vamo_ft.commands.console import logging_to
from vamo_ft.commands.finish import way_on
from vamo_ft.config.compare import meaning_changes
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import ProcessLostError, UsageError
from vamo_ft.training.checkpoint import Checkpoint
from vamo_ft.training.processes import Processes
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.rundir import RunDirectory
from vamo_ft.training.runtime import memory_errors_explained
from vamo_ft.training.shared_saving import VISIBLE_SECONDS, open_written
from vamo_ft.training.signals import StopSignals
from vamo_ft.training.sinks import NoMetrics

__all__ = ["Part", "assist"]


@dataclass(frozen=True, slots=True)
class Part:
    """This process's part in a run.

    Attributes:
        processes: those of the run; None: there is one.
    """

    processes: Processes | None

    @property
    def is_main(self) -> bool:
        """Whether it holds the run directory, writes and talks."""
        return self.processes is None or self.processes.is_main

    def begin(
        self,
        config: RunConfig,
        directory: RunDirectory,
        start: Checkpoint | None,
        *,
        allow_changes: bool = False,
        use_cache: bool = True,
        finished: bool = False,
    ) -> None:
        """Tells the other processes what is run, where and how; returns when all can take part.

        Args:
            start: what it goes on from; None: nothing.
            allow_changes: go on from a checkpoint of other settings. This one's choice is that of all: a process with
                another would wait where nobody comes.
            use_cache: keep tokens, and take them from where they were kept; of all, too.
            finished: there is nothing to do.

        Raises:
            DataError: another process has taken the run over.
            UsageError: its lease cannot be read, by which the others know the run directory.
            ProcessLostError: one of them cannot.
        """
        if self.processes is not None:
            self.processes.agreed(
                {
                    "config": config.model_dump(mode="json"),
                    "root": str(directory.root),
                    "mark": _mark(directory),
                    "checkpoint": None if start is None else str(start.path),
                    "allow_changes": allow_changes,
                    "use_cache": use_cache,
                    "finished": finished,
                }
            )
            if not finished:
                self.processes.any(False)

    def reasons_told(self) -> AbstractContextManager[None]:
        """Turns the loss of a process in the block into what it said before."""
        return nullcontext() if self.processes is None else self.processes.reasons_told()


def assist(config: RunConfig, part: Part, *, signals: StopSignals) -> None:
    """Takes part in the passes of a run of which another process writes the files, and talks.

    The run directory is on a file system that all processes see.

    Raises:
        UsageError: this process was started with another configuration, or does not see the run directory.
        VamoFtError: as the main process.
    """
    assert part.processes is not None
    console = Console(quiet=True)
    with logging_to(console), signals:
        told = part.processes.agreed(None)
        if told["finished"]:
            return
        _check_configuration(config, told["config"])
        directory = RunDirectory(Path(told["root"]))
        _check_seen(directory, told["mark"])
        part.processes.any(False)
        surroundings = RunSurroundings(
            checkpoints=directory.checkpoints,
            seed_log=directory.seed_log,
            writer=NoMetrics(),
            use_cache=told["use_cache"],
            progress=ConsoleProgress(console),
            stop_requested=signals.requested,
        )
        start = None if told["checkpoint"] is None else open_written(Path(told["checkpoint"]))
        try:
            with memory_errors_explained("the preparation of the run"):
                train_run(
                    config,
                    surroundings,
                    checkpoint=start,
                    announce=lambda run, checkpoint: None,
                    allow_changes=told["allow_changes"],
                )
        except ProcessLostError as error:  # told only where the main process cannot
            raise ProcessLostError(f"{error}; {way_on(directory)}") from None


def _check_configuration(config: RunConfig, main: Mapping[str, Any]) -> None:
    """`main` is that of the main process, which may have given the run another name (`--fresh`)."""
    if changes := meaning_changes(main, config.model_dump(mode="json"), free=["run.name"]):
        raise UsageError(
            f"on {socket.gethostname()}: started with other settings than the first process ({'; '.join(changes)}); "
            "start all of them with the same file and options"
        )


def _mark(directory: RunDirectory) -> str:
    directory.check_held()
    try:
        return directory.mark
    except OSError as error:
        raise UsageError(
            f"run.output_dir: {error.filename} cannot be read ({error.strerror}), and by it the other processes know "
            "the folder; choose one whose files can"
        ) from None


def _check_seen(directory: RunDirectory, mark: str) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while (trouble := _not_seen(directory, mark)) is not None:
        if time.monotonic() >= deadline:
            raise UsageError(f"run.output_dir: on {socket.gethostname()}: {directory.root.absolute()} {trouble}")
        time.sleep(0.5)


def _not_seen(directory: RunDirectory, mark: str) -> str | None:
    """What keeps this process from the folder in which the main one has left the mark; None: nothing."""
    try:
        if directory.mark == mark:
            return None
    except PermissionError as error:
        return f"may not be read by this process ({error.filename}); start all of them as a user who may"
    except OSError:
        pass
    return (
        "is not the folder of that name into which the first process writes; take one on a file system that all "
        "machines share"
    )
