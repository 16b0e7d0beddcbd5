"""Runs whose layers live on the host are the runs that hold them on the device, bit for bit."""

from typing import Any

import pytest

from tests.workspace import LORA, MEZO, Workspace, merged

STREAMED = ("--set", "training.stream_layers=true")
EVALUATED = {"data": {"evaluation": {"path": "eval.jsonl"}}, "evaluation": {"every": "2 steps", "metrics": ["loss", "accuracy"]}}
BASE = merged(MEZO, merged(EVALUATED, {"training": {"steps": 6}}))


def along(**directions: Any) -> dict[str, Any]:
    return {"method": {"directions": directions}}


RUNS: dict[str, dict[str, Any]] = {
    "rademacher": along(distribution="rademacher"),
    "gaussian_bfloat16": merged(along(distribution="gaussian"), {"model": {"dtype": "bfloat16"}}),
    "sphere": along(distribution="sphere"),
    "lora": {"model": {"adapter": LORA}},
    "block": {"method": {"name": "mezo_bcd"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_bits(name: str, workspace: Workspace) -> None:
    workspace.configure(merged(BASE, RUNS[name]))
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.train(*STREAMED) == 0
    assert workspace.metrics() == workspace.metrics("whole")
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.seed_log() == workspace.seed_log("whole")
