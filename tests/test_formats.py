"""Whole runs on conversations and on packed rows."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer
from transformers.models.llama import modeling_llama

from tests.chats import INSTRUCTIONS
from tests.tiny import write_jsonl
from tests.workspace import VAMO, Workspace, base_config, merged
from vamo_ft.cli import run

CHAT: dict[str, Any] = {
    "data": {
        "format": {"type": "chat"},
        "chat_template": INSTRUCTIONS,
        "max_length": 64,
    },
    "evaluation": {"metrics": ["loss", "exact_match"], "max_new_tokens": 4},
}
TEXT: dict[str, Any] = {
    "data": {"format": {"type": "text"}, "packing": True, "max_length": 32},
    "evaluation": {"metrics": ["loss"]},
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": "Say " + "a" * (index % 4)},
                {"role": "assistant", "content": "yes" if index % 2 else "no no"},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": "ok"},
            ][: 4 if index % 3 else 2]
        }
        for index in range(count)
    ]


def write_chat(workspace: Workspace) -> None:
    write_jsonl(workspace.root / "train.jsonl", [{"messages": [{"role": "user", "content": "?"}]}, *conversations(14)])
    write_jsonl(workspace.root / "eval.jsonl", conversations(5))


def write_text(workspace: Workspace) -> None:
    for file, count in (("train.jsonl", 40), ("eval.jsonl", 7)):
        rows = [
            {"text": "".join(chr(97 + (index * place) % 26) for place in range(3 + 7 * index % 45))}
            for index in range(count)
        ]
        write_jsonl(workspace.root / file, rows)


def configure(workspace: Workspace, *changes: dict[str, Any]) -> None:
    """A configuration whose format is that of the changes."""
    config = base_config()
    del config["data"]["format"]
    for change in changes:
        config = merged(config, change)
    (workspace.root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def train_whole_and_in_two_parts(workspace: Workspace) -> None:
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.train("--set", "training.steps=5") == 0
    assert workspace.train() == 0
    assert workspace.weights() == workspace.weights("whole")
    lines = [
        [line for line in workspace.metrics(name) if line["step"] == 8 or ("eval.loss" in line and line["step"] != 5)]
        for name in ("tiny", "whole")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [0, 4, 8, 8]


METHODS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "vamo": merged(VAMO, {"optimizer": {"learning_rate": 0.01}}),
    "mezo": {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-3}},
}


@pytest.mark.parametrize(("method", "packing"), [("adamw", False), ("vamo", True)])
def test_conversations(workspace: Workspace, method: str, packing: bool, capsys: pytest.CaptureFixture[str]) -> None:
    write_chat(workspace)
    configure(workspace, CHAT, METHODS[method], {"data": {"packing": packing}})
    train_whole_and_in_two_parts(workspace)
    assert "rows of the training data left out, since nothing in them is learnt: 1" in capsys.readouterr().err
    evaluations = [line for line in workspace.metrics() if "eval.loss" in line]
    assert {"eval.loss", "eval.exact_match"} <= evaluations[0].keys()
    if method == "adamw":
        assert evaluations[-1]["eval.loss"] < evaluations[0]["eval.loss"]
    saved = AutoTokenizer.from_pretrained(workspace.directory() / "model")
    assert saved.chat_template == INSTRUCTIONS
    assert run(["evaluate", "runs/tiny"]) == 0


@pytest.mark.parametrize(("method", "packing"), [("adamw", False), ("adamw", True), ("vamo", True), ("mezo", True)])
def test_documents(workspace: Workspace, method: str, packing: bool) -> None:
    write_text(workspace)
    configure(workspace, TEXT, METHODS[method], {"data": {"packing": packing}})
    train_whole_and_in_two_parts(workspace)
    before, *_, after = [line["eval.loss"] for line in workspace.metrics() if "eval.loss" in line]
    assert after < before or method == "mezo"


def test_the_samples_of_a_packed_batch_are_named_by_their_lines(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(workspace)
    configure(
        workspace,
        TEXT,
        {
            "method": {"name": "sgd"},
            "optimizer": {"learning_rate": 1e30},
            "training": {"batch_size": 2, "max_grad_norm": 1e9},
        },
    )
    assert workspace.train() == 3
    error = capsys.readouterr().err
    assert "(train.jsonl:" in error and ", train.jsonl:" in error


def test_models_that_mix_documents_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(workspace)
    configure(workspace, TEXT)
    whole = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **keys: whole(**{**keys, "position_ids": None}))
    assert workspace.train() == 2
    assert (
        "data.packing: model: this model (LlamaForCausalLM) does not keep packed documents" in capsys.readouterr().err
    )
