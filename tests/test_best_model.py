"""The best checkpoint: kept, made the final model, and waited for only so long."""

import json
from typing import Any

import pytest
import torch

from tests.workspace import LORA, Workspace, equal_weights, interrupt_at, merged
from vamo_ft.cli import run
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.training.callbacks import Evaluator
from vamo_ft.training.evaluation import EvaluationResult
from vamo_ft.training.trainer import Trainer

LOSSES = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 3.2, 12: 1.0, 14: 2.0}
"""By step; the best before a wait of three is at 4, the best of all at 12."""

BEST: dict[str, Any] = {
    "model": {"adapter": LORA},
    "training": {"steps": 14},
    "evaluation": {"every": "2 steps", "load_best_model_at_end": True},
    "checkpoint": {"every": None, "keep": 1},
    "logging": {"every": "5 steps"},
}
PATIENT = merged(BEST, {"evaluation": {"early_stopping_patience": 3}})
MEZO = {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}}


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations run as ever, and then report what `LOSSES` says of the step."""
    at_boundary = Evaluator.at_boundary

    def scripted(self: Evaluator, state: Any) -> None:
        original = self._run
        self._run = lambda: EvaluationResult(LOSSES[state.step], {"accuracy": 0.5}, original().num_samples)
        try:
            at_boundary(self, state)
        finally:
            self._run = original

    monkeypatch.setattr(Evaluator, "at_boundary", scripted)


def checkpoints(workspace: Workspace, name: str = "tiny") -> list[int]:
    return sorted(int(path.name[5:]) for path in (workspace.directory(name) / "checkpoints").iterdir())


def status(workspace: Workspace, name: str = "tiny") -> dict[str, Any]:
    return json.loads((workspace.directory(name) / "status.json").read_text())


def test_the_best_checkpoint_is_kept_and_becomes_the_model(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(BEST)
    assert workspace.train() == 0
    assert "runs/tiny/model (of step 12, the best evaluation)" in capsys.readouterr().out
    assert checkpoints(workspace) == [12, 14]
    directory = workspace.directory()
    assert equal_weights(directory / "model", directory / "checkpoints" / "step-00000012" / "model")
    assert not equal_weights(directory / "model", directory / "checkpoints" / "step-00000014" / "model")
    assert "1.0000" in (directory / "model" / "README.md").read_text()
    assert {**status(workspace), "time": None} == {
        "state": "finished",
        "exit_code": 0,
        "time": None,
        "step": 14,
        "stopped_early": False,
        "model_step": 12,
    }
    assert workspace.train("--set", "run.name=last", "--set", "evaluation.load_best_model_at_end=false") == 0
    last = workspace.directory("last")
    assert checkpoints(workspace, "last") == [14], "nobody asked for the best"
    assert equal_weights(last / "model", directory / "checkpoints" / "step-00000014" / "model")


def test_early_stopping_finishes_the_run(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(PATIENT)
    assert workspace.train() == 0
    assert "stopped early at step 10: no improvement in 3 evaluations" in capsys.readouterr().err
    assert checkpoints(workspace) == [4, 10]
    assert equal_weights(workspace.directory() / "model", workspace.directory() / "checkpoints/step-00000004/model")
    assert status(workspace)["stopped_early"] is True
    lines = workspace.metrics()
    assert [line["step"] for line in lines if "eval.loss" in line] == [0, 2, 4, 6, 8, 10]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 5, 6, 8, 10], "no step is left unlogged"
    assert workspace.train() == 0
    assert "this run is finished" in capsys.readouterr().out
    assert workspace.metrics() == lines
    (workspace.directory() / "status.json").unlink()  # as if killed before the final model
    assert workspace.train() == 0
    assert (workspace.metrics(), status(workspace)["step"]) == (lines, 10)


@pytest.mark.parametrize("method", [{}, MEZO], ids=["adamw", "mezo"])
@pytest.mark.parametrize(
    "place", [(Trainer, "_step", 3), (VerbaliserClassification, "evaluate", 3)], ids=["step", "evaluation"]
)
def test_a_stopped_run_goes_on_bit_for_bit(
    method: dict[str, Any], place: tuple[type, str, int], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure(merged(PATIENT, method))
    assert workspace.train("--set", "run.name=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, *place)
        assert workspace.train() == 75
    assert workspace.train() == 0
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")
    assert workspace.seed_log() == workspace.seed_log("whole")
    assert checkpoints(workspace) == checkpoints(workspace, "whole") == [4, 10]
    assert status(workspace)["model_step"] == 4


def test_more_patience_goes_on_as_if_it_had_been_so_from_the_start(workspace: Workspace) -> None:
    workspace.configure(merged(PATIENT, MEZO))
    assert workspace.train() == 0
    more = ("--set", "evaluation.early_stopping_patience=4")
    assert workspace.train(*more) == 0
    assert workspace.train("--set", "run.name=whole", *more) == 0
    assert (status(workspace)["step"], status(workspace)["model_step"]) == (14, 12)
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")
    assert workspace.seed_log() == workspace.seed_log("whole")


def test_a_seed_log_ends_where_the_run_does(workspace: Workspace) -> None:
    workspace.configure(merged(PATIENT, MEZO))
    assert workspace.train() == 0
    folder = workspace.directory()
    assert run(["export", "runs/tiny", "last", "--from-seedlog", "model"]) == 0
    assert run(["export", "runs/tiny", "best", "--from-seedlog", "model", "--steps", "4"]) == 0
    assert equal_weights(workspace.root / "last", folder / "checkpoints" / "step-00000010" / "model")
    assert equal_weights(workspace.root / "best", folder / "model")


def test_a_best_model_that_is_lost_is_named_and_the_next_one_taken(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(BEST, {"checkpoint": {"keep": 9}}))
    train = Trainer.train

    def train_and_damage(self: Trainer) -> None:
        train(self)
        (workspace.directory() / "checkpoints/step-00000012/model/adapter_model.safetensors").write_bytes(b"")

    monkeypatch.setattr(Trainer, "train", train_and_damage)
    assert workspace.train() == 0
    assert "the loss of step 12 was better, but its model is lost" in capsys.readouterr().err
    assert status(workspace)["model_step"] == 14


def test_evaluations_of_another_base_model_are_not_compared(workspace: Workspace) -> None:
    workspace.configure(merged(PATIENT, {"training": {"steps": 6}}))
    assert workspace.train() == 0
    workspace.configure(merged(PATIENT, {"training": {"steps": 8}, "model": {"dtype": "bfloat16"}}))
    checkpoint = str(workspace.directory() / "checkpoints" / "step-00000006")
    assert workspace.train("--resume", checkpoint, "--allow-changes") == 0
    assert status(workspace)["model_step"] == 8, "3.5, of steps 6 and 8; the 3 of step 4 is another model's"


def test_the_summary_agrees_with_the_metric(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(merged(BEST, {"evaluation": {"metric_for_best_model": "accuracy"}}))
    assert workspace.train() == 0
    assert status(workspace)["model_step"] == 2, "all are equal, and the first is taken"
    assert torch.isfinite(torch.tensor(workspace.metrics()[-1]["eval.loss"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"metric_for_best_model": "f1"}}, "f1 is not measured; add it to metrics, or write loss or ac"),
        ({"evaluation": {"metrics": ["accuracy"]}}, "metric_for_best_model: loss is not measured"),
        ({"evaluation": {"every": None}}, "evaluation.every: null evaluates the last step alone"),
        (
            {"evaluation": {"early_stopping_threshold": 0.1}},
            "evaluation.early_stopping_threshold: needs early_stopping_patience",
        ),
        ({"data": {"evaluation": None}}, "data.evaluation: required to find the best model"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    changes: dict[str, Any], message: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(BEST, changes))
    assert run(["validate", "config.yaml"]) == 2
    assert message in capsys.readouterr().err
