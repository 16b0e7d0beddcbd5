"""Runs that diverge: where they stop, what they say, and how they go back and on."""

import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import write_jsonl
from tests.workspace import LORA, MEZO, VAMO, Workspace, equal_weights, merged
from vamo_ft.assemble import model as assembly_model
from vamo_ft.assemble import run as assembly
from vamo_ft.cli import run
from vamo_ft.config.data import DataSetConfig
from vamo_ft.core.types import Batch, LossTerms
from vamo_ft.data.order import SampleOrder
from vamo_ft.data.places import row_places
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.training.trainer import Trainer

ORDER = SampleOrder(20, batch_size=6, seed=3)
ROLLBACK = {"training": {"on_divergence": "rollback"}}


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def spoil(
    monkeypatch: pytest.MonkeyPatch,
    spoilt: Callable[[Batch], bool],
    how: Callable[[Tensor], Tensor] = lambda x: x * torch.nan,
) -> None:
    """Changes the losses of the batches that `spoilt` names, as a broken sample would."""
    original = VerbaliserClassification.terms

    def terms(self: VerbaliserClassification, batch: Batch) -> LossTerms:
        found = original(self, batch)
        return LossTerms(how(found.total), found.count) if spoilt(batch) else found

    monkeypatch.setattr(VerbaliserClassification, "terms", terms)


def is_step(*steps: int) -> Callable[[Batch], bool]:
    """Whether a batch is that of one of the steps, counted from 0."""
    wanted = {ORDER.step_indices(step) for step in steps}
    return lambda batch: batch.indices in wanted


def stop_before_step(monkeypatch: pytest.MonkeyPatch, call: int, *, by: Callable[[], None]) -> None:
    step, calls = Trainer._step, 0

    def counted(self: Trainer) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            by()
        return step(self)

    monkeypatch.setattr(Trainer, "_step", counted)


def status(workspace: Workspace, name: str = "tiny") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((workspace.directory(name) / "status.json").read_text())
    return content


def saved_state(workspace: Workspace, step: int) -> dict[str, Any]:
    file = workspace.directory() / "checkpoints" / f"step-{step:08d}" / "state" / "run.json"
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_a_learning_rate_of_a_million_leaves_a_checkpoint_that_is_finite(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(
        {
            "method": {"name": "sgd"},
            "optimizer": {"learning_rate": 1e6, "weight_decay": 1.0},
            "training": {"max_grad_norm": None, "steps": 12},
            "checkpoint": {"every": "1 steps", "keep": 1},
            "data": {"evaluation": None},
            "evaluation": {"every": None, "metrics": ["loss"]},
        }
    )
    assert workspace.train() == 3
    error = capsys.readouterr().err
    (kept,) = (workspace.directory() / "checkpoints").iterdir()
    assert f"the last good checkpoint is {kept.relative_to(workspace.root)}" in error
    assert "training.on_divergence: rollback" in error
    assert status(workspace)["state"] == "diverged"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model" / "model.safetensors").values())


@pytest.mark.parametrize("method", ["sgd", "mezo", "forward_gradient"])
def test_a_spoilt_batch_is_named_by_its_samples_and_their_lines(
    method: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (workspace.root / "train.jsonl").read_text().splitlines()
    (workspace.root / "train.jsonl").write_text("\n\n".join(rows) + "\n")  # sample i is on line 2 i + 1
    workspace.configure({"method": {"name": method}, "optimizer": {"learning_rate": 1e-4}})
    spoil(monkeypatch, is_step(4))
    assert workspace.train() == 3
    error = capsys.readouterr().err
    assert "step 5: the loss is nan; the update was not made" in error
    named = ", ".join(f"{index} (train.jsonl:{2 * index + 1})" for index in ORDER.step_indices(4))
    assert f"its samples: {named};" in error
    assert "the last good checkpoint is runs/tiny/checkpoints/step-00000003;" in error


def test_a_gradient_that_is_infinite_under_a_finite_loss_stops_too(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()
    spoil(monkeypatch, is_step(1), InfiniteGradient.apply)
    assert workspace.train() == 3
    error = capsys.readouterr().err
    assert "step 2: the gradient's norm is" in error
    assert f"its samples: {ORDER.step_indices(1)[0]} (train.jsonl:" in error
    assert "there is no checkpoint yet" in error


def test_weights_that_overflow_in_the_update_are_not_saved(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(
        {
            "method": {"name": "sgd"},
            "optimizer": {"learning_rate": 1e38, "weight_decay": 1e3},
            "training": {"steps": 1},
            "data": {"evaluation": None},
            "evaluation": {"every": None, "metrics": ["loss"]},
        }
    )
    assert workspace.train() == 3
    assert "step 1: the weights are not finite after the update" in capsys.readouterr().err
    assert not list((workspace.directory() / "checkpoints").glob("*"))
    assert not workspace.directory().joinpath("model").exists()


@pytest.mark.parametrize(
    "method",
    [
        VAMO["method"],
        {**VAMO["method"], "eps": "auto"},
        {"name": "vamo_literal", "radius": 0.1, "alpha": 0.01, "snapshot": {"every": "4 steps"}},
        {"name": "svrg", "snapshot": {"every": "4 steps"}},
        {"name": "zo_svrg"},
    ],
    ids=lambda method: f"{method['name']}-{method.get('eps')}",
)
def test_a_snapshot_of_a_spoilt_sample_stops_before_the_update(
    method: dict[str, Any], workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(ROLLBACK, {"method": method, "optimizer": {"learning_rate": 1e-4}}))
    spoil(monkeypatch, lambda batch: 7 in batch.indices)
    assert workspace.train() == 3
    error = capsys.readouterr().err
    assert "snapshot of step 0: the " in error
    if method["name"] == "vamo":
        assert "the losses of " in error
        assert "7 (train.jsonl:8)" in error
    assert "a rollback would come to the same" in error
    assert [line for line in workspace.metrics() if "loss" in line or "event" in line] == []


METHODS: dict[str, dict[str, Any]] = {
    "adamw_dropout": {"model": {"adapter": {**LORA, "dropout": 0.2}}, "schedule": {"name": "linear"}},
    "momentum": {"method": {"name": "sgd"}, "optimizer": {"learning_rate": 0.01, "momentum": 0.9}},
    "vamo": VAMO,
    "mezo": {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}},
    "mezo_streamed": {**MEZO, "training": {"stream_layers": True}},
    "master_weights": {"model": {"dtype": "bfloat16"}, "optimizer": {"learning_rate": 1e-3, "master_weights": True}},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_rollback_leaves_the_step_out_and_halves_the_learning_rate(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 (number 4) diverges; the last checkpoint is that of step 3."""
    workspace.configure(merged(METHODS[name], ROLLBACK))
    with monkeypatch.context() as patch:
        spoil(patch, is_step(4))
        assert workspace.train() == 0
        with pytest.MonkeyPatch.context() as inner:
            stop_before_step(inner, 6, by=lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert workspace.train("--set", "run.name=stopped") == 75
        assert workspace.train("--set", "run.name=stopped") == 0
    assert workspace.weights("stopped") == workspace.weights()
    assert workspace.metrics("stopped") == workspace.metrics()

    (event,) = [line for line in workspace.metrics() if "event" in line]
    assert event == {
        "step": 3,
        "event": "rollback",
        "message": "step 5: the loss is nan; the update was not made",
        "diverged_step": 5,
        "skipped": True,
        "samples": list(ORDER.step_indices(4)),
        "rollbacks": 1,
        "learning_rate_scale": 0.5,
    }
    state = saved_state(workspace, 8)
    assert (state["rollbacks"], state["learning_rate_scale"], state["skipped"]) == (1, 0.5, [4])
    assert state["samples"] == 7 * 6

    # The same by hand: nothing diverges, step number 4 makes no update, the learning rate falls after step 3.
    schedule, step = assembly.learning_rate_at, Trainer._step

    def halved(number: int, **arguments: Any) -> float:
        return schedule(number, **arguments) * (0.5 if number >= 3 else 1.0)

    def without_number_four(self: Trainer) -> Any:
        if self.state.step != 4:
            return step(self)
        self.state.work += self.estimator.prepare(self.source, 4)
        self.state.step += 1
        return None

    monkeypatch.setattr(assembly, "learning_rate_at", halved)
    monkeypatch.setattr(Trainer, "_step", without_number_four)
    assert workspace.train("--set", "run.name=by-hand", "--set", "training.on_divergence=stop") == 0
    assert workspace.weights("by-hand") == workspace.weights()


def test_a_run_that_is_killed_after_a_rollback_knows_of_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure(merged(METHODS["momentum"], ROLLBACK))
    spoil(monkeypatch, is_step(4))
    assert workspace.train("--set", "run.name=whole") == 0
    with monkeypatch.context() as patch:
        stop_before_step(patch, 4, by=lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert workspace.train("--set", "checkpoint.every=null") == 75  # after step 3, where no checkpoint is due
    with monkeypatch.context() as patch:
        stop_before_step(patch, 3, by=lambda: 1 // 0)  # the first step after the rollback
        assert workspace.train("--set", "checkpoint.every=null") == 1
    state = saved_state(workspace, 3)
    assert (state["rollbacks"], state["learning_rate_scale"], state["skipped"]) == (1, 0.5, [4])
    assert workspace.train() == 0
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")


def test_the_model_that_diverged_is_gone_before_the_next_one_is_loaded(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, models = assembly_model.load_model, list[weakref.ref[Any]]()

    def load_alone(*arguments: Any, **keywords: Any) -> Any:
        assert all(model() is None for model in models), "two models at a time need twice the memory"
        loaded = load(*arguments, **keywords)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(assembly_model, "load_model", load_alone)
    workspace.configure(merged({**VAMO, "model": {"adapter": LORA}}, ROLLBACK))
    spoil(monkeypatch, is_step(4))
    assert workspace.train() == 0
    assert len(models) == 2


def test_a_rollback_before_the_first_checkpoint_goes_back_to_the_start(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure(ROLLBACK)
    spoil(monkeypatch, is_step(1))
    assert workspace.train() == 0
    lines = workspace.metrics()
    assert [(line["step"], line["event"]) for line in lines if "event" in line] == [(0, "rollback")]
    assert [line["step"] for line in lines if "eval.loss" in line] == [0, 4, 8]
    assert [line["learning_rate"] for line in lines if "loss" in line] == [0.005] * 3  # step 2 has no line


@pytest.mark.parametrize("left_out", [4, 7])
def test_a_seed_log_tells_of_a_rollback(left_out: int, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that was left out is no gap in it, and the halved learning rate is that of the replay."""
    workspace.configure(merged({**MEZO, "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1}}, ROLLBACK))
    spoil(monkeypatch, is_step(left_out))
    assert workspace.train() == 0
    assert [line["diverged_step"] for line in workspace.metrics() if "event" in line] == [left_out + 1]
    for steps in ((), ("--steps", "8")):
        out = "-".join(("out", *steps))
        assert run(["export", "runs/tiny", out, "--from-seedlog", "model", *steps]) == 0
        assert equal_weights(workspace.root / out, workspace.directory() / "model")
    assert run(["export", "runs/tiny", "six", "--from-seedlog", "model", "--steps", "6"]) == 0
    assert equal_weights(workspace.root / "six", workspace.directory() / "checkpoints" / "step-00000006" / "model")


def test_the_last_line_counts_what_a_last_step_that_is_left_out_leaves(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure(merged(METHODS["momentum"], {**ROLLBACK, "logging": {"every": "3 steps"}}))
    spoil(monkeypatch, is_step(7))
    assert workspace.train("--set", "run.name=whole") == 0
    with monkeypatch.context() as patch:
        stop_before_step(patch, 9, by=lambda: os.kill(os.getpid(), signal.SIGTERM))  # the first after the rollback
        assert workspace.train() == 75
    assert workspace.train() == 0
    assert workspace.metrics() == workspace.metrics("whole")
    lines = [line for line in workspace.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert (lines[-1]["samples"], "learning_rate" in lines[-1]) == (7 * 6, False)
    assert isinstance(lines[-1]["loss"], float)


def test_rollbacks_are_counted_and_run_out(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(ROLLBACK, {"training": {"rollbacks": 2}}))
    spoil(monkeypatch, is_step(4, 5, 6))
    assert workspace.train() == 3
    error = capsys.readouterr().err
    assert "step 7: the loss is nan" in error
    assert "2 rollbacks were made, no more are allowed (training.rollbacks)" in error
    assert "the last good checkpoint is runs/tiny/checkpoints/step-00000006" in error
    events = [line for line in workspace.metrics() if "event" in line]
    assert [(line["rollbacks"], line["diverged_step"]) for line in events] == [(1, 5), (2, 6)]
    assert workspace.train() == 3  # it goes on from step 6, with the two that were made
    assert workspace.train("--set", "training.rollbacks=3") == 0
    state = saved_state(workspace, 8)
    assert (state["rollbacks"], state["learning_rate_scale"], state["skipped"]) == (3, 0.125, [4, 5, 6])


def test_a_damaged_checkpoint_is_not_gone_back_to(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(batch: Batch) -> bool:
        if found := is_step(7)(batch):
            (newest := workspace.directory() / "checkpoints" / "step-00000006" / "model" / "model.safetensors").unlink(
                missing_ok=True
            )
            assert not newest.exists()
        return found

    workspace.configure(ROLLBACK)
    spoil(monkeypatch, damage)
    assert workspace.train() == 0
    (event,) = [line for line in workspace.metrics() if "event" in line]
    assert (event["step"], event["diverged_step"]) == (3, 8)


def test_a_projected_coefficient_that_is_not_finite_moves_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of opposite infinities in their difference alone: the mean loss stays finite."""
    from vamo_ft.estimators.probes import LossProbe

    applied: list[int] = []
    derivatives, apply = LossProbe.derivatives, ProjectedSgd.apply

    def spoilt(self: LossProbe, *arguments: Any) -> Any:
        found, total = derivatives(self, *arguments)
        return (found * torch.inf if len(applied) == 2 else found), total

    def noted(self: ProjectedSgd, estimate: Any, **arguments: Any) -> Any:
        applied.append(arguments["step"])
        return apply(self, estimate, **arguments)

    monkeypatch.setattr(LossProbe, "derivatives", spoilt)
    monkeypatch.setattr(ProjectedSgd, "apply", noted)
    workspace.configure({"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}})
    assert workspace.train() == 3
    assert "step 3: a projected gradient is not finite; the update was not made" in capsys.readouterr().err
    assert applied == [0, 1]


def test_rows_are_found_by_line_or_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train-1.jsonl", [{"x": 1}, {"x": 2}])
    (folder / "train-2.jsonl").write_text('\n{"x": 3}\n\n{"x": 4}\n')
    assert row_places(DataSetConfig(path="set"), [3, 0, 2]) == [
        "set/train-2.jsonl:4",
        "set/train-1.jsonl:1",
        "set/train-2.jsonl:2",
    ]
    (tmp_path / "a.csv").write_text('x\n"1\n2"\n3\n')
    assert row_places(DataSetConfig(path="a.csv"), [1]) == ["a.csv, row 2"]
    (tmp_path / "a.json").write_text('[{"x": 1}, {"x": 2}]')
    assert row_places(DataSetConfig(path="a.json"), [1]) == ["a.json, row 2"]
    assert row_places(DataSetConfig(path="owner/name"), [4]) == ["owner/name, row 5"]
