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
from vamo_ft.config.compare import meaning_changes
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.training.checkpoint import Checkpoint, open_checkpoint
from vamo_ft.training.processes import Processes
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.rundir import RunDirectory
from vamo_ft.training.runtime import memory_errors_explained
from vamo_ft.training.signals import StopSignals
from vamo_ft.training.sinks import NoMetrics

__all__ = ["Part", "assist"]

_VISIBLE_SECONDS = 90.0  # after which a network file system shows what another machine has written


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
        self, config: RunConfig, directory: RunDirectory, start: Checkpoint | None, *, finished: bool = False
    ) -> None:
        """Tells the other processes what is run and where, and what it goes on from; returns when all can take part.

        Args:
            finished: there is nothing to do.

        Raises:
            ProcessLostError: one of them cannot.
        """
        if self.processes is not None:
            self.processes.agreed(
                {
                    "config": config.model_dump(mode="json"),
                    "root": str(directory.root),
                    "mark": directory.mark,
                    "checkpoint": None if start is None else str(start.path),
                    "finished": finished,
                }
            )
            if not finished:
                self.processes.any(False)

    def reasons_told(self) -> AbstractContextManager[None]:
        """Turns the loss of a process in the block into what it said before."""
        return nullcontext() if self.processes is None else self.processes.reasons_told()


def assist(config: RunConfig, part: Part, *, signals: StopSignals, allow_changes: bool, use_cache: bool) -> None:
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
            use_cache=use_cache,
            progress=ConsoleProgress(console),
            stop_requested=signals.requested,
        )
        start = None if told["checkpoint"] is None else open_checkpoint(Path(told["checkpoint"]))
        with memory_errors_explained("the preparation of the run"):
            train_run(
                config,
                surroundings,
                checkpoint=start,
                announce=lambda run, checkpoint: None,
                allow_changes=allow_changes,
            )


def _check_configuration(config: RunConfig, main: Mapping[str, Any]) -> None:
    """`main` is that of the main process, which may have given the run another name (`--fresh`)."""
    if changes := meaning_changes(main, config.model_dump(mode="json"), free=["run.name"]):
        raise UsageError(
            f"on {socket.gethostname()}: started with other settings than the first process ({'; '.join(changes)}); "
            "start all of them with the same file and options"
        )


def _check_seen(directory: RunDirectory, mark: str) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while directory.mark != mark:
        if time.monotonic() >= deadline:
            raise UsageError(
                f"run.output_dir: on {socket.gethostname()}: {directory.root.absolute()} is not the folder of that "
                "name into which the first process writes; take one on a file system that all machines share"
            )
        time.sleep(0.5)
