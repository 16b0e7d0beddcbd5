"""Whole runs on tasks: with solved examples and a sample of the rows, on a metric and on a loss, and continued."""

from typing import Any

import pytest
import yaml

from tests.data.test_tasks import HUB
from tests.tiny import write_jsonl
from tests.workspace import Workspace, base_config, merged

MEZO = {"method": {"name": "mezo", "eps": 0.02}, "optimizer": {"learning_rate": 1e-3}}
ACCURACY = {**MEZO, "objective": {"type": "metric", "name": "accuracy"}}
ADAMW = {"method": {"name": "adamw"}, "optimizer": {"learning_rate": 0.01}}


def configure(workspace: Workspace, name: str, changes: dict[str, Any]) -> None:
    rows = [
        HUB["record"] | {"query": f"In {year} it was @placeholder.", "answers": [["Ada"], ["Bob", "Rome"]][year % 2]}
        for year in range(12)
    ]
    if name == "rte":
        rows = [HUB["rte"] | {"hypothesis": f"It rained {n} times.", "label": n % 2} for n in range(12)]
    write_jsonl(workspace.root / "rows.jsonl", rows)
    drawn = {"record": {"size": 8}, "rte": {"per_class": 4}}[name]
    held_out = {"record": {"size": 4, "skip": 8}, "rte": {"per_class": 2, "skip": 4}}[name]
    config = merged(base_config(), changes)
    config["data"] = {
        "train": {"path": "rows.jsonl", "sample": {**drawn, "seed": 1}},
        "evaluation": {"path": "rows.jsonl", "sample": {**held_out, "seed": 1}},
        "format": {"type": "task", "name": name, "shots": 1},
        "max_length": 400,
    }
    config["checkpoint"] = {"every": "2 steps"}
    (workspace.root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@pytest.mark.parametrize(("name", "changes"), [("record", ACCURACY), ("record", ADAMW), ("rte", MEZO)])
def test_a_continued_run_is_the_run(workspace: Workspace, name: str, changes: dict[str, Any]) -> None:
    configure(workspace, name, {**changes, "training": {"steps": 4, "batch_size": 4}})
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.train("--set", "training.steps=2") == 0
    assert workspace.train() == 0
    assert workspace.weights() == workspace.weights("whole")
    losses = [[line["loss"] for line in workspace.metrics(name) if "loss" in line] for name in ("tiny", "whole")]
    assert losses[0] == losses[1]
    evaluated = [line for line in workspace.metrics("whole") if "eval.accuracy" in line]
    assert evaluated[0]["eval.samples"] == 4
