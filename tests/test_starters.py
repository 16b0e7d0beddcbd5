"""What `vamo-ft init` writes, and what configs/ holds, trains: here with a tiny model and a few rows in them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_model_folder, tiny_llama, write_jsonl
from tests.workspace import Workspace
from vamo_ft.cli import run
from vamo_ft.commands.data_format import format_of
from vamo_ft.config.load import load_config
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name not in ("paper", "cloud")]
EXAMPLES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
    "prompt_completion": {"prompt": "1+1?", "completion": " 2"},
    "classification": {"sentence": "a joy", "label": 1},
    "text": {"text": "once upon a time"},
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


def known_formats() -> set[str]:
    return set(re.findall(r'"const": "(\w+)"', json.dumps(RunConfig.model_json_schema()["$defs"]))) & EXAMPLES.keys()


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def rows_for(config: RunConfig) -> list[dict[str, Any]]:
    """Rows with the columns that the configuration's format names."""
    section = config.data.format
    if section.type == "classification":
        columns = re.findall(r"\{(\w+)\}", section.template)
        labels = list(section.labels)
        return [{**dict.fromkeys(columns, "a joy"), section.label: labels[i % len(labels)]} for i in range(8)]
    if section.type == "prompt_completion":
        columns = re.findall(r"\{(\w+)\}", section.prompt + section.completion)
        return [dict.fromkeys(columns, "a joy")] * 8
    return [EXAMPLES[section.type]] * 8


def train_small(workspace: Workspace, path: Path) -> None:
    config = load_config(path).config
    rows = write_jsonl(workspace.root / "rows.jsonl", rows_for(config))
    if config.model.quantization is not None:  # of blocks of 64 weights
        save_model_folder(workspace.root / "model", tiny_llama(hidden=64))
    settings = workspace.root / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    overrides = ["model.path=model", f"data.train={{path: {rows.name}}}", "training.steps=2", "training.batch_size=2"]
    overrides += ["run.output_dir=runs", "run.offline=true"]
    if config.data.evaluation is not None:
        overrides.append(f"data.evaluation={{path: {rows.name}}}")
    if (snapshot := getattr(config.method, "snapshot", None)) is not None and snapshot.set != "all":
        overrides.append("method.snapshot.set=all")
    if config.training.epochs is not None:
        overrides.append("training.epochs=null")
    if config.method.name == "sparse_mezo":  # norms that were never trained have no smaller weights
        overrides.append("model.freeze=['*norm*']")
    assert run(["train", str(path), *sets(*overrides)]) == 0
    status = json.loads((workspace.root / "runs" / config.run.name / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_trains(path: Path, workspace: Workspace) -> None:
    train_small(workspace, path)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_starter_trains(method: str, workspace: Workspace) -> None:
    assert run(["init", "--method", method]) == 0
    train_small(workspace, Path("config.yaml"))


@pytest.mark.parametrize("kind", sorted(known_formats()))
def test_a_starter_for_ones_own_data_trains_as_it_is(
    kind: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = workspace.root / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    rows = [{**EXAMPLES[kind], **({"label": index % 2} if kind == "classification" else {})} for index in range(8)]
    write_jsonl(Path("mine.jsonl"), rows)
    assert format_of("mine.jsonl")["type"] == kind
    assert run(["init", "--model", "model", "--data", "mine.jsonl", "--out", "mine.yaml"]) == 0
    assert capsys.readouterr().out == "wrote mine.yaml\nnext:  vamo-ft train mine.yaml\n"
    assert run(["train", "mine.yaml", *sets("training.steps=2")]) == 0


def test_a_starter_without_network_is_one_line(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init"]) == 0
    assert run(["train", "config.yaml", *sets("model.path=model", "run.offline=true")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert "stanfordnlp/sst2" in error[0]
