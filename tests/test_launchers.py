"""torchrun and accelerate themselves, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_processes import ENDLESS, PATIENCE, ROOT, free_port
from tests.workspace import Workspace
from vamo_ft.cli import run

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "4")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
TRAIN = ("-m", "vamo_ft", "train", "config.yaml")


def launched(*command: str, cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_of_one_process_goes_on_in_four_is_interrupted_and_ends_in_two(workspace: Workspace) -> None:
    workspace.configure(ENDLESS)
    assert workspace.train("--set", "training.steps=2") == 0

    four = launched(*TORCHRUN, *TRAIN, cwd=workspace.root)
    assert four.stdout is not None
    lines = []
    for line in four.stdout:
        lines.append(line)
        if line.startswith("step 4 "):
            four.send_signal(signal.SIGINT)
            break
    lines += four.communicate(timeout=PATIENCE)[0].splitlines(keepends=True)
    status = json.loads((workspace.directory() / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["cause"]) == ("stopped", 75, "SIGINT"), "".join(lines)
    assert sum("by SIGINT; to go on, train tiny again" in line for line in lines) == 1
    assert sum(line.startswith("step 4 ") for line in lines) == 1
    done = workspace.metrics()[-1]["step"]

    two = launched(*ACCELERATE, *TRAIN, "--set", f"training.steps={done + 2}", cwd=workspace.root)
    output = two.communicate(timeout=PATIENCE)[0]
    assert two.returncode == 0, output
    assert output.count(f"going on from runs/tiny/checkpoints/step-{done:08}") == 1
    assert [line["step"] for line in workspace.metrics() if "loss" in line] == list(range(1, done + 3))


def test_a_signal_to_one_box_stops_both(workspace: Workspace) -> None:
    """Two launchers play two boxes that share a folder."""
    workspace.configure(ENDLESS)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}")
    box = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting)
    boxes = [launched(*box, *TRAIN, cwd=workspace.root) for _ in range(2)]
    deadline = time.monotonic() + PATIENCE
    lines = workspace.directory() / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    boxes[1].send_signal(signal.SIGTERM)
    outputs = [each.communicate(timeout=PATIENCE)[0] for each in boxes]
    status = json.loads((workspace.directory() / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75), outputs
    assert sum(output.count("to go on, train tiny again") for output in outputs) >= 1
    done = workspace.metrics()[-1]["step"]
    assert (workspace.directory() / "checkpoints" / f"step-{done:08}").is_dir()
    assert workspace.train("--set", f"training.steps={done + 1}") == 0


def test_the_message_of_a_failure_is_in_the_launchers_report(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workspace.configure({"training": {"stepz": 6, "batch_sise": 6}})
    file = workspace.root / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert run(["train", config]) == 2
    told = json.loads(file.read_text())["message"]
    assert told["message"] == told["extraInfo"]["py_callstack"]
    assert [f"error: {line}" for line in told["message"].splitlines()] == capsys.readouterr().err.splitlines()
    assert len(told["message"].splitlines()) == 2
