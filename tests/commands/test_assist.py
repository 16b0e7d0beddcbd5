"""What a process is told of a run, and a run directory which it does not see."""

import socket
from pathlib import Path
from typing import Any, cast

import pytest

from tests.workspace import MEZO, Workspace
from vamo_ft.assemble import RunSurroundings
from vamo_ft.commands import assist as module
from vamo_ft.commands.assist import Part, assist
from vamo_ft.config.load import load_config
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.training.processes import Processes
from vamo_ft.training.rundir import RunDirectory
from vamo_ft.training.signals import StopSignals


class Told:
    """The other process: both of them, one after the other."""

    is_main = False

    def __init__(self) -> None:
        self.value: Any = None

    def agreed(self, value: Any) -> Any:
        self.value = value or self.value
        return self.value

    def any(self, flag: bool) -> bool:
        return flag


def locked(workspace: Workspace) -> tuple[RunConfig, Part, RunDirectory]:
    """A configuration, the part in it of a process, and the run directory as the main one holds it."""
    main = RunDirectory(Path("runs/tiny"))
    main.lock()
    return load_config(Path(workspace.configure(MEZO))).config, Part(cast(Processes, Told())), main


@pytest.mark.parametrize("there", ["nothing", "a folder", "another run"])
def test_a_run_directory_on_another_disk_is_refused(
    there: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VISIBLE_SECONDS", 0.0)
    config, part, main = locked(workspace)
    part.begin(config, main, None)
    main.unlock()  # as its machine has it, and this one does not
    if there != "nothing":
        main.root.mkdir(parents=True, exist_ok=True)
    if there == "another run":
        (main.root / ".lease.json").write_text('{"host": "elsewhere"}')
    with pytest.raises(UsageError) as caught:
        assist(config, part, signals=StopSignals())
    assert str(caught.value) == (
        f"run.output_dir: on {socket.gethostname()}: {Path('runs/tiny').absolute()} is not the folder of that name "
        "into which the first process writes; take one on a file system that all machines share"
    )


@pytest.mark.parametrize("held", [True, False])
def test_a_first_process_that_cannot_read_its_own_lease_starts_nothing(
    held: bool, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would find the same, nothing, on any disk."""
    config, part, main = locked(workspace)
    lease = main.root / ".lease.json"
    if held:
        monkeypatch.setattr(RunDirectory, "mark", property(lambda self: (lease / "x").read_text()))
    else:
        lease.unlink()
    with pytest.raises(UsageError if held else DataError) as caught:
        part.begin(config, main, None)
    main.unlock()
    assert str(caught.value).startswith(
        "run.output_dir: runs/tiny/.lease.json/x cannot be read (Not a directory), and by it the other processes know "
        if held
        else "runs/tiny: this process gave no sign of life for some minutes"
    )


def test_a_run_directory_that_may_not_be_read_is_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISIBLE_SECONDS", 0.0)
    config, part, main = locked(workspace)
    part.begin(config, main, None)

    def forbidden(self: RunDirectory) -> str:
        raise PermissionError(13, "Permission denied", str(self.root / ".lease.json"))

    monkeypatch.setattr(RunDirectory, "mark", property(forbidden))
    with pytest.raises(UsageError) as caught:
        assist(config, part, signals=StopSignals())
    main.unlock()
    assert str(caught.value) == (
        f"run.output_dir: on {socket.gethostname()}: {Path('runs/tiny').absolute()} may not be read by this process "
        "(runs/tiny/.lease.json); start all of them as a user who may"
    )


@pytest.mark.parametrize("choice", [True, False])
def test_the_first_process_says_what_all_take(
    choice: bool, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, part, main = locked(workspace)
    part.begin(config, main, None, allow_changes=choice, use_cache=not choice)
    taken = {}

    def train_run(config: RunConfig, surroundings: RunSurroundings, **options: Any) -> None:
        taken.update(options, use_cache=surroundings.use_cache)

    monkeypatch.setattr(module, "train_run", train_run)
    assist(config, part, signals=StopSignals())
    main.unlock()
    assert (taken["allow_changes"], taken["use_cache"]) == (choice, not choice)
