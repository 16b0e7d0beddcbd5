"""A process that is told of a run directory which it does not see."""

import socket
from pathlib import Path
from typing import Any, cast

import pytest

from tests.workspace import MEZO, Workspace
from vamo_ft.commands import assist as module
from vamo_ft.commands.assist import Part, assist
from vamo_ft.config.load import load_config
from vamo_ft.core.errors import UsageError
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


@pytest.mark.parametrize("there", ["nothing", "a folder", "another run"])
def test_a_run_directory_on_another_disk_is_refused(
    there: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_VISIBLE_SECONDS", 0.0)
    config = load_config(Path(workspace.configure(MEZO))).config
    part = Part(cast(Processes, Told()))
    main = RunDirectory(Path("runs/tiny"))
    main.lock()
    part.begin(config, main, None)
    main.unlock()  # as its machine has it, and this one does not
    if there != "nothing":
        main.root.mkdir(parents=True, exist_ok=True)
    if there == "another run":
        (main.root / ".lease.json").write_text('{"host": "elsewhere"}')
    with pytest.raises(UsageError) as caught:
        assist(config, part, signals=StopSignals(), allow_changes=False, use_cache=False)
    assert str(caught.value) == (
        f"run.output_dir: on {socket.gethostname()}: {Path('runs/tiny').absolute()} is not the folder of that name "
        "into which the first process writes; take one on a file system that all machines share"
    )
