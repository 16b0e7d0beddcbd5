"""Metrics as the objective, and scores of generated answers, through the command line."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.tiny import write_jsonl
from tests.workspace import Workspace, interrupt_at, merged
from vamo_ft.cli import run
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.objectives.generation import AnswerScores
from vamo_ft.training.trainer import Trainer

MEZO = {
    "method": {"name": "mezo", "eps": 0.03},
    "optimizer": {"learning_rate": 0.009},
    "training": {"steps": 6, "batch_size": 6},
}
ACCURACY = {**MEZO, "objective": {"type": "metric", "name": "accuracy"}}
ANSWERS = {
    "run": {"name": "tiny", "seed": 3},
    "model": {"path": "model"},
    "data": {
        "train": {"path": "pairs.jsonl"},
        "evaluation": {"path": "pairs.jsonl"},
        "format": {"type": "prompt_completion", "prompt": "{question}?", "completion": " {answer}"},
        "max_length": 48,
    },
    "method": {"name": "adamw"},
    "optimizer": {"learning_rate": 0.01},
    "training": {"steps": 40, "batch_size": 4},
    "evaluation": {"every": "3 steps", "metrics": ["loss", "exact_match", "f1"], "max_new_tokens": 24},
    "checkpoint": {"every": "3 steps"},
    "logging": {"every": "2 steps"},
}
F1 = {
    "run": {"name": "tiny"},
    "model": {"path": "runs/learnt/model"},
    **MEZO,
    "optimizer": {"learning_rate": 1e-4},
    "method": {"name": "mezo", "eps": 0.01},
    "objective": {"type": "metric", "name": "f1", "max_new_tokens": 12},
}


def configure_answers(workspace: Workspace, changes: Mapping[str, Any] | None = None) -> None:
    """A configuration in which a question is answered in words."""
    pairs = [("red", "a warm colour"), ("blue", "a cold colour"), ("grey", "no colour"), ("loud", "no colour at all")]
    write_jsonl(workspace.root / "pairs.jsonl", [{"question": key, "answer": value} for key, value in pairs])
    text = yaml.safe_dump(merged(ANSWERS, changes or {}), sort_keys=False)
    (workspace.root / "config.yaml").write_text(text, encoding="utf-8")


def configure_f1(workspace: Workspace) -> None:
    """F1 as the objective, of a model that answers half right."""
    learning = {"run": {"name": "learnt"}, "training": {"steps": 25}, "evaluation": {"every": None}}
    configure_answers(workspace, learning)
    assert workspace.train() == 0
    configure_answers(workspace, F1)


def evaluations(workspace: Workspace, name: str) -> list[float]:
    return [line[f"eval.{name}"] for line in workspace.metrics() if f"eval.{name}" in line]


def losses(workspace: Workspace) -> list[float]:
    return [line["loss"] for line in workspace.metrics() if "loss" in line]


def test_mezo_on_accuracy_raises_it(workspace: Workspace) -> None:
    """All 20 samples in a step, from a model that gives every sample the same class."""
    workspace.configure(
        merged(
            ACCURACY,
            {
                "run": {"seed": 6},
                "data": {"evaluation": {"path": "train.jsonl"}, "format": {"labels": {0: "b", 1: "f"}}},
                "method": {"probes": 4},
                "optimizer": {"learning_rate": 0.015},
                "schedule": {"name": "linear"},
                "training": {"steps": 40, "batch_size": 20},
                "evaluation": {"every": None},
            },
        )
    )
    assert workspace.train() == 0
    before, after = evaluations(workspace, "accuracy")
    assert before == 0.5
    assert after >= 0.9
    assert losses(workspace)[-1] < 0.3 < 0.4 < losses(workspace)[0]  # one minus the accuracy at the probe points


def test_answers_that_are_all_wrong_change_nothing(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """An untrained model; the ordinary loss would call it an error."""
    configure_answers(workspace, {**F1, "model": {"path": "model"}, "objective": {"type": "metric", "name": "f1"}})
    assert workspace.train() == 0
    assert losses(workspace) == [1.0] * 3
    assert [line["method.projected_gradient"] for line in workspace.metrics() if "loss" in line] == [0.0] * 3
    before = load_file(workspace.root / "model" / "model.safetensors")
    after = load_file(workspace.directory() / "model" / "model.safetensors")
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_answers_are_learnt_shown_and_evaluated_again(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    configure_answers(workspace, {"evaluation": {"every": "20 steps"}})
    assert workspace.train() == 0
    for name in ("exact_match", "f1"):
        assert evaluations(workspace, name)[0] == 0
        assert evaluations(workspace, name)[-1] == 1
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if "exact_match" in line)
    assert "0.0000" in row and "1.0000" in row

    last = workspace.metrics()[-1]
    assert run(["evaluate", "runs/tiny"]) == 0
    perplexity = math.exp(last["eval.loss"])
    assert capsys.readouterr().out == (
        f"samples      4\nloss         {last['eval.loss']:.4f}\nperplexity   {perplexity:.4f}\n"
        "exact_match  1.0000\nf1           1.0000\n"
    )
    write_jsonl(
        workspace.root / "other.jsonl", [{"question": "red", "answer": "warm"}, {"question": "grey", "answer": "!"}]
    )
    assert run(["evaluate", "runs/tiny", "--data", "other.jsonl"]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (lines["samples"], lines["exact_match"]) == ("2", "0.0000")
    assert lines["f1"] == f"{(2 * 1 / (2 + 1) + 0) / 2:.4f}"  # 'warm colour' for 'warm', 'no colour' for nothing
    assert run(["evaluate", "runs/tiny", "--set", "evaluation.max_new_tokens=7"]) == 0
    assert "exact_match  0.0000" in capsys.readouterr().out  # ' no col' is all that fits
    assert (
        run(["evaluate", "runs/tiny", "--set", "evaluation.metrics=[loss]", "--set", "evaluation.max_new_tokens=32"])
        == 0
    )
    assert (
        capsys.readouterr().out == f"samples     4\nloss        {last['eval.loss']:.4f}\nperplexity  {perplexity:.4f}\n"
    )


@pytest.mark.parametrize(
    ("configure", "owner", "method"),
    [
        (lambda workspace: workspace.configure(ACCURACY), VerbaliserClassification, "evaluate"),
        (configure_f1, AnswerScores, "__call__"),
    ],
    ids=["accuracy", "f1"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    configure: Any, owner: type, method: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a step, and within the evaluation before the first and after the third."""
    configure(workspace)
    assert workspace.train("--set", "run.name=whole", "--set", "training.forward_batch_tokens=40") == 0
    for where, name, call in [(owner, method, 1), (Trainer, "_step", 3), (owner, method, 3)]:
        with monkeypatch.context() as patch:
            interrupt_at(patch, where, name, call)
            assert workspace.train("--set", "training.forward_batch_tokens=40") == 75
    assert workspace.train("--set", "training.forward_batch_tokens=40") == 0
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")
    assert len(set(losses(workspace))) > 1  # the metric did move
    assert all(0 < loss < 1 for loss in losses(workspace))


def test_another_objective_is_another_run_and_a_longer_answer_another_result(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_answers(workspace, {**F1, "model": {"path": "model"}})
    assert workspace.train() == 0
    assert workspace.train("--set", "training.steps=7", "--set", "objective.name=exact_match") == 2
    assert "objective.name: 'f1' -> 'exact_match'" in capsys.readouterr().err
    assert workspace.train("--set", "training.steps=7", "--set", "evaluation.max_new_tokens=4") == 0
    steps = [line["step"] for line in workspace.metrics() if "eval.f1" in line]
    assert steps == [0, 3, 6, 6, 7]  # step 6 anew, under the new length
    table = capsys.readouterr().out
    assert "exact_match" in table


def test_answers_longer_than_the_model_has_positions_for_are_refused_at_the_start(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_answers(workspace, {"evaluation": {"max_new_tokens": 512}})
    assert workspace.train() == 2
    assert "the model has positions for 512; lower data.max_length" in capsys.readouterr().err
    assert not any("step" in line for line in workspace.metrics())


def test_validate_shows_the_section(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(ACCURACY)
    assert run(["validate", "config.yaml"]) == 0
    lines = [line.split("#")[0].split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line and line[0].startswith("objective.")] == [
        ["objective.type", "metric"],
        ["objective.name", "accuracy"],
        ["objective.max_new_tokens", "32"],
    ]


@pytest.mark.parametrize("command", ["plan", "diagnose"])
def test_what_the_other_commands_propose_is_taken(
    workspace: Workspace, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workspace.configure(ACCURACY)
    assert run([command, config]) == 2
    _, proposed, _ = capsys.readouterr().err.rsplit("'", 2)
    assert proposed == "objective={type: loss}"
    assert run(["validate", config, "--set", proposed]) == 0
