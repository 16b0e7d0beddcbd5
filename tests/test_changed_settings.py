"""Continuing a run with other settings, other data or another base model: refused and named, or allowed and logged."""

import json
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny import save_model_folder, sentiment_rows, tiny_llama, write_jsonl
from tests.workspace import ADAMW, LORA, VAMO, Workspace
from vamo_ft.assemble import run
from vamo_ft.training.checkpoint import newest_checkpoint

MEZO = {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}}
SPARSE = {"method": {"name": "sparse_mezo"}, "optimizer": {"learning_rate": 1e-3}}
NO_NORMS = {"model": {"freeze": ["*norm*"]}}


def half(workspace: Workspace, config: dict[str, Any] | None = None) -> str:
    """A run of 4 steps; its last checkpoint."""
    workspace.configure({**(config or {}), "training": {"steps": 4}})
    assert workspace.train() == 0
    return str(workspace.directory().relative_to(workspace.root) / "checkpoints" / "step-00000004")


def log(workspace: Workspace) -> str:
    return (workspace.directory() / "log.txt").read_text()


def losses(workspace: Workspace) -> list[int]:
    return [line["step"] for line in workspace.metrics() if "loss" in line]


def test_other_keys_continue_by_themselves(workspace: Workspace) -> None:
    half(workspace)
    workspace.configure({"training": {"steps": 6, "max_seconds": 1000}, "logging": {"every": "1 steps"}})
    assert workspace.train("--set", "checkpoint.keep=5", "--set", "checkpoint.on_error=continue") == 0
    workspace.configure({"training": {"steps": 6}})
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.weights() == workspace.weights("whole")


def test_another_learning_rate_is_named_and_then_allowed(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = half(workspace, ADAMW)
    workspace.configure({**ADAMW, "training": {"steps": 6}})
    change = ("--set", "optimizer.learning_rate=0.02", "--set", "training.batch_size=5")
    assert workspace.train(*change) == 2
    error = capsys.readouterr().err
    assert "optimizer.learning_rate: 0.01 -> 0.02; training.batch_size: 6 -> 5" in error
    assert "--allow-changes" in error
    assert workspace.train(*change, "--resume", checkpoint) == 2
    assert workspace.train(*change, "--allow-changes") == 2
    assert "needs --resume PATH" in capsys.readouterr().err
    assert workspace.train(*change, "--resume", checkpoint, "--allow-changes") == 0
    assert "--allow-changes: optimizer.learning_rate: 0.01 -> 0.02" in log(workspace)
    assert "--allow-changes: training.batch_size: 6 -> 5" in log(workspace)
    assert "dropped" not in log(workspace), "first-order estimates have no state, and the moments fit"
    assert losses(workspace) == [2, 4, 6]
    # From here on these are the run's settings.
    assert workspace.train(*change, "--set", "training.steps=7") == 0


def test_the_moments_go_on_under_another_learning_rate(workspace: Workspace) -> None:
    """The same settings in another spelling lead to the same weights, so that nothing was lost on the way."""
    checkpoint = half(workspace, ADAMW)
    workspace.configure({**ADAMW, "training": {"steps": 6}})
    assert workspace.train("--set", "schedule.warmup_steps=1", "--resume", checkpoint, "--allow-changes") == 0
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.weights() == workspace.weights("whole")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (VAMO, MEZO, "the state of the estimator is dropped"),
        (MEZO, VAMO, ""),
        (VAMO, {**VAMO, "method": {**VAMO["method"], "probes": 3}}, "the state of the estimator is dropped"),
        (VAMO, {**VAMO, "data": {"max_length": 40}}, "the state of the estimator is dropped"),
        ({}, {"method": {"name": "sgd"}}, "the state of the optimizer is dropped"),
        ({}, {"model": {"freeze": ["*layers.0.*"]}}, "the optimizer's state of 9 of"),
        ({**MEZO, **NO_NORMS}, {**SPARSE, **NO_NORMS}, "seedlog.bin is removed"),
        ({**SPARSE, **NO_NORMS}, {**MEZO, **NO_NORMS}, ""),
        ({**SPARSE, **NO_NORMS}, {**SPARSE, "run": {"seed": 9}, **NO_NORMS}, "the state of the directions is dropped"),
        (
            {"method": {"name": "svrg", "snapshot": {"every": "4 steps"}}},
            {"method": {"name": "zo_svrg"}, "optimizer": {"learning_rate": 1e-4}},
            "the state of the estimator is dropped",
        ),
    ],
)
def test_what_does_not_fit_is_dropped_and_said(
    workspace: Workspace, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    checkpoint = half(workspace, before)
    workspace.configure({**after, "training": {"steps": 8}})
    assert workspace.train() == 2
    assert workspace.train("--resume", checkpoint, "--allow-changes") == 0
    assert losses(workspace) == [2, 4, 6, 8]
    assert said in log(workspace)
    assert ("dropped" in log(workspace)) == ("dropped" in said or "optimizer's state" in said)
    assert not (workspace.directory() / "seedlog.bin").exists()
    assert json.loads((workspace.directory() / "status.json").read_text())["state"] == "finished"


def test_an_adapter_cannot_be_made_of_a_whole_model(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = half(workspace)
    workspace.configure({"model": {"adapter": LORA}, "training": {"steps": 8}})
    capsys.readouterr()
    assert workspace.train("--resume", checkpoint, "--allow-changes") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "adapter" in error[0]


def test_other_samples_are_allowed_too(workspace: Workspace) -> None:
    checkpoint = half(workspace, VAMO)
    workspace.configure({**VAMO, "training": {"steps": 6}})
    write_jsonl(workspace.root / "train.jsonl", sentiment_rows(17))
    assert workspace.train() == 2
    assert workspace.train("--resume", checkpoint, "--allow-changes") == 0
    assert "--allow-changes: data.train samples: " in log(workspace)
    assert "the state of the estimator is dropped" in log(workspace)


@pytest.mark.parametrize("adapter", [None, LORA])
@pytest.mark.parametrize("part", ["weights", "configuration", "tokenizer"])
def test_another_base_model_is_refused_and_named(
    adapter: Any, part: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model": {"adapter": adapter}}
    checkpoint = half(workspace, config)
    workspace.configure({**config, "training": {"steps": 6}})
    folder = workspace.root / "model"
    if part == "weights":  # of the same shapes: one value differs
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif part == "configuration":
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-3}))
    else:
        content = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": "{{ messages }}"}))
    capsys.readouterr()
    assert workspace.train() == 2
    error = capsys.readouterr().err
    assert f"model.path: model: the {part} differ" in error
    assert "step-00000004 began with; restore the model" in error
    assert workspace.train("--resume", checkpoint, "--allow-changes") == 0
    assert f"--allow-changes: model.path {part}: " in log(workspace)
    assert workspace.train("--set", "training.steps=7") == 0, "the run's base is the new one now"


def test_a_base_model_that_is_gone_is_not_needed_and_remembered(workspace: Workspace) -> None:
    half(workspace)
    workspace.configure({"training": {"steps": 6}})
    (workspace.root / "model").rename(workspace.root / "aside")
    assert workspace.train() == 0
    checkpoint = newest_checkpoint(workspace.directory() / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.facts["base"]["path"] == "model"
    save_model_folder(workspace.root / "model", tiny_llama(seed=1))
    assert workspace.train("--set", "training.steps=7") == 2


def test_another_version_is_a_line_in_the_log(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    half(workspace)
    workspace.configure({"training": {"steps": 6}})
    monkeypatch.setattr(run, "__version__", "9.9.9")
    assert workspace.train() == 0
    assert "was written by vamo-ft 0.1.0, this is 9.9.9" in log(workspace)
