import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vamo_ft.core.errors import DataError
from vamo_ft.training.rundir import RunDirectory, environment, write_json, write_text

HOLD = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1] + "/.lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(descriptor, f"process {os.getpid()} on elsewhere".encode())
print("locked", flush=True)
sys.stdin.read()
"""


def test_second_process_is_refused_and_a_dead_one_never_blocks(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(DataError, match=f"in use by process {other.pid} on elsewhere; wait") as caught:
            RunDirectory(tmp_path).lock()
        assert "\n" not in str(caught.value)
        other.kill()
    RunDirectory(tmp_path).lock()


def test_lock_names_its_holder_and_can_be_given_back(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "new"), RunDirectory(tmp_path / "new")
    first.lock()
    with pytest.raises(DataError, match=f"in use by process {os.getpid()} on "):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_paths(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = [run.config, run.environment, run.metrics, run.log, run.checkpoints, run.model, run.status]
    names = "config.yaml environment.json metrics.jsonl log.txt checkpoints model status.json"
    assert [str(path.relative_to(tmp_path)) for path in paths] == names.split()


def test_status(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.read_status() == {}
    run.write_status("running")
    assert json.loads(run.status.read_text())["exit_code"] is None
    run.write_status("stopped", exit_code=75, facts={"step": 4})
    status = run.read_status()
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 4)
    run.status.write_text('{"state": "st')
    assert run.read_status() == {}


def test_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "newer")
    assert path.read_text() == "newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_json_is_standard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_environment_has_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    facts = environment("NVIDIA H100")
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["device"] == "NVIDIA H100"
    assert "hf_planted" not in json.dumps(facts)
