"""`vamo-ft evaluate --predictions`: every kind of line, against the metrics and against plain passes of the model."""

import json
import math
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.data.test_tasks import HUB
from tests.refusals import check_refused
from tests.tiny import byte_tokenizer, sentiment_rows, write_jsonl
from tests.workspace import LORA, Workspace, base_config, merged
from vamo_ft.cli import run
from vamo_ft.data.tasks import TASKS

RECORD = [
    HUB["record"] | {"passage": "Long ago. " * (n % 3), "entities": ["Ada", "Bob", "Rome"][: 2 + n % 2]}
    for n in range(7)
]
SQUAD = [HUB["squad"] | {"context": "Rivers flow. " * (n % 4 + 1)} for n in range(5)]


def configure(workspace: Workspace, format: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> None:
    write_jsonl(workspace.root / "rows.jsonl", rows)
    config = merged(base_config(), {"training": {"steps": 2}, **changes})
    data = {"train": {"path": "rows.jsonl"}, "evaluation": {"path": "rows.jsonl"}, "format": format, "max_length": 200}
    config["data"] = merged(data, changes.get("data", {}))
    (workspace.root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def predictions(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The lines of a run's predictions, and what is printed."""
    assert workspace.train() == 0
    capsys.readouterr()
    assert run(["evaluate", "runs/tiny", "--predictions", "out.jsonl"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    lines = [json.loads(line) for line in (workspace.root / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(int(printed["samples"])))
    total, weight = sum(line["loss"] * line["weight"] for line in lines), sum(line["weight"] for line in lines)
    assert printed["loss"] == f"{total / weight:.4f}"
    for name in printed.keys() - {"samples", "loss", "perplexity"}:
        assert printed[name] == f"{sum(line[name] for line in lines) / len(lines):.4f}"
    return lines, printed


def test_classes(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sentiment_rows(9)
    format = {"type": "classification", "template": "{sentence} It was", "labels": {0: " bad", 1: " fine"}}
    configure(workspace, format, rows, run={"name": "tiny", "seed": 3})
    lines, printed = predictions(workspace, capsys)
    assert "perplexity" not in printed
    model = AutoModelForCausalLM.from_pretrained(workspace.directory() / "model").eval()
    for line, row in zip(lines, rows, strict=True):
        assert list(line) == [
            *("index", "place", "prompt", "label", "prediction", "option_scores", "accuracy", "loss", "weight")
        ]
        assert line["place"] == f"rows.jsonl:{line['index'] + 1}"
        assert line["prompt"] == f"{row['sentence']} It was"
        assert line["label"] == str(row["label"])
        for name, text in (("0", " bad"), ("1", " fine")):
            prompt, option = (byte_tokenizer()(part)["input_ids"] for part in (line["prompt"], text))
            with torch.no_grad():
                logits = model(torch.tensor([prompt + option])).logits[0, len(prompt) - 1 : -1]
            found = logits.log_softmax(-1)[range(len(option)), option]
            assert line["option_scores"][name] == pytest.approx(found.mean().item(), abs=1e-4)
            if name == line["label"]:
                assert line["loss"] == pytest.approx(-found.mean().item(), abs=1e-4)
                assert line["weight"] == len(option)
        assert line["prediction"] == max(line["option_scores"], key=line["option_scores"].__getitem__)
        assert line["accuracy"] == float(line["prediction"] == line["label"])


def test_options_of_the_rows(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"sample": {"size": 4, "seed": 1}}
    configure(workspace, {"type": "task", "name": "record"}, RECORD, data={"evaluation": sample})
    lines, _ = predictions(workspace, capsys)
    assert len(lines) == 4
    places = [int(line["place"].partition(":")[2]) - 1 for line in lines]
    assert places == sorted(set(places)) != list(range(4))
    for line, place in zip(lines, places, strict=True):
        task = TASKS["record"].build(RECORD[place], "")
        assert line["prompt"] == task.prompt
        assert list(line["option_scores"]) == [option.strip() for option in task.options]
        assert line["right"] == [task.options[option].strip() for option in task.right]
        assert line["label"] == line["right"][0]
        assert line["accuracy"] == float(line["prediction"] in line["right"])


def test_answers(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = ["loss", "perplexity", "exact_match", "f1", "rouge_l"]
    configure(workspace, {"type": "task", "name": "squad"}, SQUAD, evaluation={"metrics": metrics, "max_new_tokens": 5})
    lines, printed = predictions(workspace, capsys)
    assert printed.keys() == {"samples", *metrics}
    assert float(printed["perplexity"]) == pytest.approx(math.exp(float(printed["loss"])), rel=1e-3)
    last = workspace.metrics()[-1]
    assert last["eval.perplexity"] == pytest.approx(math.exp(last["eval.loss"]))
    for line, row in zip(lines, SQUAD, strict=True):
        assert line["prompt"] == TASKS["squad"].build(row, "").prompt
        assert line["references"] == ["The Thames", "Thames"]
        assert isinstance(line["answer"], str)
        assert line["weight"] == len(" The Thames") + 1


def test_losses_alone(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    format = {"type": "prompt_completion", "prompt": "{sentence}", "completion": " {label}"}
    configure(workspace, format, sentiment_rows(5), evaluation={"metrics": ["loss"]})
    lines, _ = predictions(workspace, capsys)
    assert [line["references"] for line in lines] == [[" 0"], [" 1"], [" 0"], [" 1"], [" 0"]]
    assert all(list(line) == ["index", "place", "prompt", "references", "loss", "weight"] for line in lines)


def test_a_classifier_head(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"path": "model", "task": "sequence_classification"}
    configure(workspace, {"type": "task", "name": "cb"}, [HUB["cb"] | {"label": n % 3} for n in range(6)], model=model)
    lines, _ = predictions(workspace, capsys)
    for number, line in enumerate(lines):
        assert line["label"] == ["entailment", "contradiction", "neutral"][number % 3]
        assert sum(math.exp(score) for score in line["option_scores"].values()) == pytest.approx(1, abs=1e-5)
        assert line["loss"] == pytest.approx(-line["option_scores"][line["label"]], abs=1e-5)
    saved = json.loads((workspace.directory() / "model" / "config.json").read_text(encoding="utf-8"))
    assert saved["id2label"] == {"0": "entailment", "1": "contradiction", "2": "neutral"}


def test_a_merged_classifier_names_its_classes_by_the_texts_of_the_labels(workspace: Workspace) -> None:
    model = {"task": "sequence_classification", "adapter": LORA}
    workspace.configure({"model": model, "training": {"steps": 1}})
    assert workspace.train() == 0
    assert run(["export", "runs/tiny", "merged", "--merge"]) == 0
    saved = json.loads((workspace.root / "merged" / "config.json").read_text(encoding="utf-8"))
    assert saved["id2label"] == {"0": "bad", "1": "fine"}


def test_where_no_file_can_be_nothing_is_computed(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure({"training": {"steps": 1}})
    assert workspace.train() == 0
    for name, fault in (("no/out.jsonl", "there is no folder no"), ("runs", "is a folder")):
        said = f"--predictions: {name}: {fault}; name a file"
        check_refused(workspace, said, capsys, "evaluate", "runs/tiny", "--predictions", name)
