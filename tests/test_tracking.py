"""Runs with trackers: the figures of metrics.jsonl arrive, once, in one tracked run, whatever happens to the run."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import check_refused
from tests.test_divergence import ROLLBACK, is_step, spoil
from tests.training.tracker_stubs import Shown, install
from tests.workspace import TIMES, Workspace, interrupt_at, merged
from vamo_ft.training.trackers import Trackers
from vamo_ft.training.trainer import Trainer

TRACKERS = ["tensorboard", "wandb", "mlflow", "trackio"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    return install(monkeypatch)


def written(workspace: Workspace) -> list[tuple[int, str, float]]:
    """The figures of metrics.jsonl, sorted, without those of the clock."""
    return sorted(
        (line["step"], name, value)
        for line in workspace.metrics()
        for name, value in line.items()
        if name != "step" and "event" not in line and isinstance(value, int | float)
    )


def stable(points: list[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    return sorted(point for point in points if point[1] not in TIMES)


def test_every_tracker_gets_what_is_written(workspace: Workspace, shown: Shown) -> None:
    workspace.configure({"logging": {"trackers": TRACKERS}})
    assert workspace.train() == 0
    assert len(shown.points) == 4
    for points in shown.points.values():
        assert stable(points) == written(workspace)
        assert all(math.isfinite(value) for _, _, value in points)
    assert sorted(shown.finished, key=str) == [
        ("mlflow", "FINISHED"),
        ("tensorboard", None),
        ("trackio", None),
        ("wandb", 0),
    ]
    ids = json.loads((workspace.directory() / "trackers.json").read_text())
    opened = {each["tracker"]: each for each in shown.opened}
    assert (opened["wandb"]["id"], opened["wandb"]["project"]) == (ids["wandb"], "vamo-ft")
    assert opened["wandb"]["settings"].console == "off"
    assert opened["wandb"]["mode"] is None
    assert opened["trackio"]["name"] == f"tiny-{ids['trackio']}"
    assert opened["mlflow"]["experiment"] == "vamo-ft"
    assert opened["tensorboard"]["folder"] == str(workspace.directory().relative_to(workspace.root) / "tensorboard")
    assert opened["wandb"]["config"]["training.batch_size"] == 6
    assert shown.parameters["mlflow/0"]["training.batch_size"] == "6"


def test_a_resumed_run_goes_on_in_the_same_tracked_run(
    workspace: Workspace, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once, then killed after steps that no checkpoint holds, which are made again."""
    workspace.configure({"logging": {"every": "1 steps", "trackers": TRACKERS}})
    with monkeypatch.context() as patch:
        interrupt_at(patch, Trainer, "_step", 2)
        assert workspace.train() == 75
    assert ("wandb", 75) in shown.finished
    assert ("mlflow", "KILLED") in shown.finished
    with monkeypatch.context() as patch:
        update, calls = Trainer._update, 0

        def crash(self: Trainer, batches: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise RuntimeError("crashed")
            return update(self, batches)

        patch.setattr(Trainer, "_update", crash)
        assert workspace.train() == 1
    assert ("mlflow", "FAILED") in shown.finished
    assert (workspace.directory() / "metrics.jsonl").read_text().count('"loss"') == 4
    assert workspace.train() == 0
    assert (workspace.directory() / "metrics.discarded.jsonl").is_file()
    assert len(shown.points) == 4
    assert [each["purge_step"] for each in shown.opened if each["tracker"] == "tensorboard"] == [0, 2, 4]
    assert len({each["id"] for each in shown.opened if each["tracker"] == "wandb"}) == 1
    for points in shown.points.values():
        assert stable(points) == written(workspace)


def test_a_run_that_begins_anew_is_another_one(
    workspace: Workspace, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure({"logging": {"trackers": ["wandb", "mlflow", "trackio"]}})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self: 1 / 0)
        assert workspace.train() == 1
    assert workspace.train() == 0
    for tracker in ("wandb", "trackio"):
        name = "id" if tracker == "wandb" else "name"
        assert len({each[name] for each in shown.opened if each["tracker"] == tracker}) == 2
    assert {"mlflow/0", "mlflow/1"} <= shown.parameters.keys()


def test_after_a_rollback_no_step_is_shown_twice(
    workspace: Workspace, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure(merged(ROLLBACK, {"logging": {"every": "1 steps", "trackers": TRACKERS}}))
    spoil(monkeypatch, is_step(4))
    assert workspace.train() == 0
    assert stable(shown.points["tensorboard"]) == written(workspace)
    for points in shown.points.values():
        places = [(step, name) for step, name, _ in points]
        assert len(set(places)) == len(places)
        assert {step for step, _ in places} == {0, 1, 2, 3, 4, 6, 7, 8}


def test_trackers_that_fail_change_nothing(
    workspace: Workspace, shown: Shown, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> Any:
        raise ConnectionError("https://user:sesame00@host refused")

    workspace.configure()
    assert workspace.train() == 0
    sys.modules["wandb"].init = init  # type: ignore[attr-defined]
    assert workspace.train("--set", "run.name=tracked", "--set", "logging.trackers=[wandb]") == 0
    assert workspace.weights() == workspace.weights("tracked")
    assert workspace.metrics() == workspace.metrics("tracked")
    said = capsys.readouterr().err
    assert said.count("logging.trackers: wandb fails (ConnectionError: https://***@host refused)") == 1


def test_no_secret_reaches_a_tracker(workspace: Workspace, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "swordfish0")
    (workspace.root / "swordfish0.jsonl").write_bytes((workspace.root / "train.jsonl").read_bytes())
    workspace.configure(
        {"data": {"train": {"path": "swordfish0.jsonl"}}, "training": {"steps": 1}, "logging": {"trackers": TRACKERS}}
    )
    assert workspace.train() == 0
    assert "***.jsonl" in repr(shown)
    assert "swordfish0" not in repr(shown)


def test_offline_runs_stay_offline(
    workspace: Workspace, shown: Shown, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(
        {"run": {"offline": True}, "training": {"steps": 1}, "logging": {"trackers": ["wandb"], "project": "mine"}}
    )
    assert workspace.train() == 0
    assert (shown.opened[0]["mode"], shown.opened[0]["project"]) == ("offline", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    message = (
        "run.offline: MLFLOW_TRACKING_URI names a server, which logging.trackers: mlflow would call; unset it, or "
        "leave the tracker out"
    )
    check_refused(
        workspace,
        message,
        capsys,
        "train",
        "config.yaml",
        "--set",
        "logging.trackers=[mlflow]",
        "--set",
        "run.name=new",
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert workspace.train("--set", "logging.trackers=[mlflow]", "--set", "run.name=new") == 0


def test_the_project_comes_from_the_environment(
    workspace: Workspace, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    workspace.configure({"training": {"steps": 1}, "logging": {"trackers": ["wandb"]}})
    assert workspace.train() == 0
    assert shown.opened[0]["project"] == "theirs"


@pytest.mark.parametrize(
    ("name", "extra"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio"), ("tensorboard", "tracking")]
)
def test_a_missing_package_is_told_before_anything_begins(
    name: str, extra: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("vamo_ft.assemble.trackers.find_spec", lambda name: None)
    workspace.configure({"logging": {"trackers": [name]}})
    message = f"logging.trackers: {name} is not installed; pip install 'vamo-ft[{extra}]', or leave it out"
    check_refused(workspace, message, capsys)
    assert not workspace.directory().exists()


def test_real_event_files(tmp_path: Path) -> None:
    """TensorBoard itself reads back what two processes of a run wrote."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from vamo_ft.training.tracker_clients import RunIds, TensorBoard, TrackedRun

    run = TrackedRun("tiny", "vamo-ft", tmp_path, {"run.name": "tiny"}, RunIds(tmp_path / "trackers.json"))
    for start, steps in ((None, range(1, 6)), (3, range(4, 8))):
        with Trackers([TensorBoard(run)]) as trackers:
            trackers.go_on(start)
            for step in steps:
                trackers.write({"step": step, "loss": 1 / step})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 8)
    ]
