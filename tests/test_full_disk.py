"""Whole runs on a disk that fills up: one line for the user, nothing lost, and the same weights in the end."""

import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.full_disk import fill, largest_file, pretend_free, small_disk
from tests.workspace import ADAMW, LORA, VAMO, Workspace, merged
from vamo_ft.assemble import space
from vamo_ft.training.trainer import Trainer

CONFIG = {**VAMO, **ADAMW, "logging": {"every": "1 steps"}}


@pytest.fixture
def disk(workspace: Workspace) -> Iterator[Path]:
    """The folder of the runs, with room for a little more than the run needs."""
    workspace.configure(CONFIG)
    assert workspace.train("--set", "run.name=whole", "--set", "run.output_dir=whole") == 0
    with small_disk(workspace.root / "runs", size=100_000_000) as path:
        yield path


def same_as_whole(workspace: Workspace) -> bool:
    here, whole = workspace.weights(), workspace.weights("../whole/whole")
    return here == whole and workspace.metrics() == workspace.metrics("../whole/whole")


def at_step(patch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    original = Trainer._step

    def step(self: Trainer) -> Any:
        if self.state.step == number:
            action()
        return original(self)

    patch.setattr(Trainer, "_step", step)


def errors_of(text: str) -> list[str]:
    assert "Traceback" not in text
    assert "Logging error" not in text
    return [line for line in text.splitlines() if line.startswith(("error", "unexpected"))]


def test_a_disk_that_fills_stops_the_run_and_loses_nothing(
    disk: Path, workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: fill(disk, leave=0))
        assert workspace.train() == 2
    (error,) = errors_of(capfd.readouterr().err)
    assert "are missing; the last checkpoint stays: runs/tiny/checkpoints/step-00000003" in error
    assert sorted(path.name for path in (disk / "tiny" / "checkpoints").iterdir()) == ["step-00000003"]
    assert workspace.train() == 2, "there is still no room"
    (error,) = errors_of(capfd.readouterr().err)
    assert "No space left on device" in error
    (disk / "ballast").unlink()
    assert workspace.train() == 0
    assert same_as_whole(workspace)


def test_a_run_may_continue_to_the_next_checkpoint(
    disk: Path, workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: fill(disk, leave=0))
        at_step(patch, 7, (disk / "ballast").unlink)
        assert workspace.train("--set", "checkpoint.on_error=continue") == 0
    error = capfd.readouterr().err
    assert errors_of(error) == []
    assert "the run continues, as checkpoint.on_error says" in error
    assert "metrics.jsonl: cannot be written (No space left on device)" in error
    names = sorted(path.name for path in (disk / "tiny" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000008"]
    assert same_as_whole(workspace)


def test_the_final_model_that_does_not_fit_is_written_by_the_next_run(
    disk: Path, workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        train = Trainer.train

        def then_full(self: Trainer) -> None:
            train(self)
            fill(disk, leave=50_000)

        patch.setattr(Trainer, "train", then_full)
        assert workspace.train() == 2
    (error,) = errors_of(capfd.readouterr().err)
    assert "runs/tiny: no room to write (No space left on device" in error
    assert "train again with the same settings" in error
    status = json.loads((disk / "tiny" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert not list((disk / "tiny").glob(".model*"))
    (disk / "ballast").unlink()
    assert workspace.train() == 0
    assert same_as_whole(workspace)


def test_space_is_asked_for_before_the_first_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three checkpoints with two moments for each weight, and the final model, each with 16 MiB for small files."""
    workspace.configure(ADAMW)
    weights = 35_168 * 4
    needed = 3 * (3 * weights + 2**24) + weights + 2**24
    pretend_free(monkeypatch, needed - 1)
    assert workspace.train() == 2
    error = capsys.readouterr().err
    assert (
        f"3 checkpoints of {(3 * weights + 2**24) / 1e9:.3f} GB and the final model need {needed / 1e9:.3f} GB" in error
    )
    assert not (workspace.directory() / "checkpoints").exists()
    assert all("eval.loss" not in line for line in workspace.metrics())
    pretend_free(monkeypatch, needed)
    assert workspace.train() == 0
    pretend_free(monkeypatch, 0)
    assert workspace.train("--set", "training.steps=10", "--set", "checkpoint.on_error=continue") == 0
    assert "the run continues" in capsys.readouterr().err


SNAPSHOTS: dict[str, dict[str, Any]] = {
    "vamo": {"method": {"probes": 40}},
    "vamo_recompute": {"method": {"source": "recompute"}},
    "vamo_informed": {
        "method": {
            "probes": 3,
            "eps": None,
            "alpha": 1.0,
            "directions": {"structure": "gradient_subspace", "warmup_steps": 4},
        },
        "model": {"adapter": LORA},
    },
    "svrg": {"method": {"name": "svrg", "probes": None, "eps": None}},
    "vamo_literal": {"method": {"name": "vamo_literal", "probes": 1, "eps": None, "radius": 0.01, "alpha": 0.01}},
    "zo_svrg": {"method": {"name": "zo_svrg", "eps": 1e-3}, "optimizer": {"learning_rate": 1e-6}},
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_the_space_of_snapshots_to_come_is_known_before_they_are_taken(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for is what the largest checkpoint takes, and no more than a little beyond."""
    asked: list[int] = []

    def check(root: Path, *, state_bytes: int, **others: Any) -> None:
        asked.append(state_bytes)

    monkeypatch.setattr(space, "check_run_space", check)
    config = merged(merged(VAMO, SNAPSHOTS[name]), {"data": {"evaluation": None}, "evaluation": {"metrics": ["loss"]}})
    config["method"] = {key: value for key, value in config["method"].items() if value is not None}
    workspace.configure(merged(config, {"evaluation": {"every": None}, "optimizer": {"name": "sgd"}}))
    assert workspace.train("--set", "checkpoint.keep=9", "--set", "checkpoint.every=1 steps") == 0
    folders = (workspace.directory() / "checkpoints").iterdir()
    largest = max(sum(file.stat().st_size for file in folder.glob("state/*.safetensors")) for folder in folders)
    headers = 10_000
    assert largest - headers < asked[0] < 1.2 * largest


def test_a_limit_on_the_size_of_files_is_one_line(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    workspace.configure(CONFIG)
    with largest_file(60_000):
        assert workspace.train() == 2
    (error,) = errors_of(capfd.readouterr().err)
    assert "File too large" in error
    assert "a limit on the size of files" in error
    assert list((workspace.directory() / "checkpoints").iterdir()) == []
    assert workspace.train() == 0


def test_no_room_for_temporary_files_is_one_line(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries look for a folder when they are imported, and fail in a way of their own."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    workspace.configure(CONFIG)
    with largest_file(0):
        assert workspace.train() == 2
    (error,) = errors_of(capsys.readouterr().err)
    assert error.startswith("error: No usable temporary directory found in ['")
    assert error.endswith("make room there, or name a folder in the variable TMPDIR")
    assert not (workspace.root / "runs").exists()
    assert workspace.train() == 0


def test_lines_that_wait_for_room_are_in_the_checkpoint(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every file of a small adapter still fits when metrics.jsonl does not."""
    workspace.configure({**ADAMW, "model": {"adapter": LORA}, "logging": {"every": "1 steps"}})
    arguments = ("--set", "training.steps=40", "--set", "checkpoint.every=5 steps")
    assert workspace.train(*arguments, "--set", "run.name=whole") == 0

    def refuse_more() -> None:
        size = (workspace.directory() / "metrics.jsonl").stat().st_size
        assert size > 10_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 32, refuse_more)
            assert workspace.train(*arguments) == 2
        assert workspace.train(*arguments) == 2, "there is still no room"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for error in errors_of(capfd.readouterr().err):
        assert "runs/tiny/metrics.jsonl: no room for its last " in error
        assert "train again with the same settings to go on" in error
    assert [path.name for path in sorted((workspace.directory() / "checkpoints").iterdir())][-1] == "step-00000040"
    assert workspace.metrics()[-1]["step"] == 32
    assert workspace.train(*arguments) == 0
    assert (workspace.weights(), workspace.metrics()) == (workspace.weights("whole"), workspace.metrics("whole"))
