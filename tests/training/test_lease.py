"""Who holds a run directory: processes, restarts that look alike, other hosts, and clocks that are set back."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.workspace import Workspace
from vamo_ft.core.errors import DataError
from vamo_ft.training import lease, rundir
from vamo_ft.training.lease import Holder, Lease
from vamo_ft.training.rundir import RunDirectory

HOLD = """
import sys
from pathlib import Path
from vamo_ft.training.rundir import RunDirectory
RunDirectory(Path(sys.argv[1])).lock()
print("locked", flush=True)
sys.stdin.read()
"""
ELSEWHERE = replace(Holder.here(), host="elsewhere", boot_id="another")


def plant(directory: Path, holder: Holder, *, age: float = 0.0) -> Path:
    path = directory / ".lease.json"
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_killed_process_is_taken_over_and_named(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        (tmp_path / ".lock").unlink()  # the lease alone still tells that it lives
        with pytest.raises(DataError, match=rf"in use by process {other.pid} on .* \(it is running\)"):
            RunDirectory(tmp_path).lock()
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        zombie = RunDirectory(tmp_path)  # ended, and its number not yet given back
        assert f"process {other.pid} on" in str(zombie.lock())
        zombie.unlock()
    directory = RunDirectory(tmp_path)
    assert directory.lock() is None
    assert json.loads((tmp_path / ".lease.json").read_text()) == asdict(Holder.here())
    directory.unlock()
    assert not (tmp_path / ".lease.json").exists()


@pytest.mark.parametrize("changes", [{"started": 1}, {"boot_id": "before"}, {"pid": 2**22 + 1}])
def test_a_restart_that_looks_alike_does_not_block(tmp_path: Path, changes: dict[str, object]) -> None:
    """The same host with the same process number, as in a container that was restarted, or after a reboot."""
    plant(tmp_path, replace(Holder.here(), **changes))
    directory = RunDirectory(tmp_path)
    assert "no longer there" in str(directory.lock())
    directory.unlock()
    plant(tmp_path, Holder.here())
    with pytest.raises(DataError, match="it is running"):
        directory.lock()


def test_another_host_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    plant(tmp_path, ELSEWHERE, age=100)
    with pytest.raises(DataError, match=r"in use by process \d+ on elsewhere .*100 s ago.* try again in 80 s"):
        directory.lock()
    plant(tmp_path, ELSEWHERE, age=lease.STALE_SECONDS - 5)
    with pytest.raises(DataError, match="elsewhere"):
        directory.lock()
    plant(tmp_path, ELSEWHERE, age=lease.STALE_SECONDS + 5)
    assert "on elsewhere (no sign of life for 185 s)" in str(directory.lock())
    directory.unlock()


def test_a_clock_that_was_set_back_never_blocks(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    plant(tmp_path, ELSEWHERE, age=-3600)
    assert "elsewhere" in str(directory.lock())
    directory.unlock()
    plant(tmp_path, ELSEWHERE, age=-20)  # two hosts that do not quite agree
    with pytest.raises(DataError, match="elsewhere"):
        directory.lock()


def test_a_lease_that_cannot_be_read_never_blocks(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"host": 1}'):
        (tmp_path / ".lease.json").write_text(text)
        directory = RunDirectory(tmp_path)
        assert "cannot be read" in str(directory.lock())
        directory.unlock()


def test_the_heart_beats_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / "lease"
    held = Lease(path)
    for _ in range(2):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert abs(path.stat().st_mtime - time.time()) < 60
    other = tmp_path / "other"
    other.write_text("taken over")
    os.utime(other, (1, 1))
    other.replace(path)
    time.sleep(0.05)
    assert path.stat().st_mtime == 1, "another's lease is not kept alive"
    held.release()
    assert path.read_text() == "taken over"


def test_a_file_system_without_locks_has_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(rundir.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(rundir.fcntl, "flock", refuse)
    first = RunDirectory(tmp_path)
    assert first.lock() is None
    with pytest.raises(DataError, match=f"in use by process {os.getpid()}"):
        RunDirectory(tmp_path).lock()
    first.unlock()


def test_a_directory_that_was_taken_over_is_left_alone(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.lock()
    directory.check_held()
    directory.write_status("running")
    plant(tmp_path, ELSEWHERE)  # the same file: written over, and not taken
    directory.check_held()
    other = tmp_path / "other"
    other.write_text("x")
    other.replace(tmp_path / ".lease.json")
    with pytest.raises(DataError, match="taken over by another one; nothing more is written"):
        directory.check_held()
    status = (tmp_path / "status.json").read_bytes()
    directory.write_status("failed")
    assert (tmp_path / "status.json").read_bytes() == status
    (tmp_path / ".lease.json").unlink()  # and has ended since
    with pytest.raises(DataError, match="taken over"):
        directory.check_held()
    directory.unlock()


@pytest.mark.parametrize(("number", "held"), [(errno.ESTALE, False), (errno.EIO, True)])
def test_on_a_network_file_system_a_lease_that_was_replaced_is_stale(
    number: int, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path)
    directory.lock()

    def fail(descriptor: int) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        assert directory.is_held == held
    directory.unlock()


FROZEN = """
import os, signal, sys
from vamo_ft.training import {module} as module
original = module.{name}
def frozen(*arguments, **keywords):
    if {when}:
        print("frozen", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return original(*arguments, **keywords)
module.{name} = frozen
from vamo_ft.cli import main
main()
"""
PLACES = {
    "between_steps": ("trainer", "_checked_loss", "keywords['step'] == 4"),
    "within_a_save": ("checkpoint", "_write_manifest", "keywords['step'] == 6"),
    "before_a_line": ("sinks", "finite", "isinstance(arguments[0], dict) and arguments[0].get('step') == 4"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_process_that_was_frozen_leaves_the_run_to_who_took_it_over(place: str, workspace: Workspace) -> None:
    """As if its machine was suspended: the other one goes on from the last checkpoint, and ends before it wakes."""
    module, name, when = PLACES[place]
    workspace.configure({"checkpoint": {"every": "3 steps"}})
    program = FROZEN.format(module=module, name=name, when=when)
    root = str(Path(rundir.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", program, "train", "config.yaml"],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "frozen\n"
        directory = workspace.directory()
        (directory / ".lock").unlink()  # locks do not reach the other machine
        plant(directory, ELSEWHERE, age=lease.STALE_SECONDS + 5)
        assert workspace.train() == 0

        def content() -> dict[str, bytes]:
            files = [path for path in directory.rglob("*") if path.is_file() and path.name != "log.txt"]
            return {str(path): path.read_bytes() for path in files if ".tmp-" not in str(path)}

        before = content()
        process.send_signal(signal.SIGCONT)
        error = process.stderr.read()
    assert process.returncode == 2, error
    assert "was taken over by another one; nothing more is written" in error
    assert content() == before
    assert not [path for path in (directory / "checkpoints").iterdir() if path.name.startswith(".")]
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"


def test_a_run_logs_whom_it_takes_over_from(workspace: Workspace) -> None:
    workspace.configure({"training": {"steps": 2}})
    workspace.directory().mkdir(parents=True)
    plant(workspace.directory(), replace(Holder.here(), started=1))
    assert workspace.train() == 0
    text = (workspace.directory() / "log.txt").read_text()
    assert f"taken over from process {os.getpid()} on {Holder.here().host} (it is no longer there)" in text
    plant(workspace.directory(), ELSEWHERE)
    assert workspace.train("--set", "training.steps=3") == 2
