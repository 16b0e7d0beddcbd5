"""Runs of two processes that diverge, go back and go on: as one process does."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spoilt import is_part
from tests.test_divergence import ROLLBACK, spoil
from tests.test_processes import finish, free_port, start
from tests.workspace import ADAMW, LORA, MEZO, VAMO, Workspace, merged, weights_in

MASTERS: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "optimizer": {"learning_rate": 1e-3, "master_weights": True}}
SHARED = {"training": {"fsdp": True}}

CASES: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "vamo_lora": {**VAMO, "model": {"adapter": LORA}},
    "master_weights": MASTERS,
    "mezo_shared": merged(MEZO, SHARED),
    "master_weights_shared": merged(MASTERS, SHARED),
}


def configured(workspace: Workspace, name: str, *, alone: bool) -> str:
    changes = {"run": {"name": f"{name}-alone" if alone else name}, "training": {"micro_batch_size": 3}}
    config = merged(merged(CASES[name], ROLLBACK), changes)
    if alone:
        config["training"]["fsdp"] = False
    return workspace.configure(config, file=f"{changes['run']['name']}.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace in which two processes have trained every case, and one alone."""
    workspace = Workspace(tmp_path_factory.mktemp("rollback"))
    files = [configured(workspace, name, alone=False) for name in CASES]
    arguments = [word for file in files for word in (file, str(free_port()))]
    codes, errors = finish(start("tests.spoilt", *arguments, cwd=workspace.root))
    assert codes == [0, 0], errors
    assert errors[0].count("going back to it with 0.5 of the learning rate (rollback 1 of 3)") == len(CASES)
    before = Path.cwd()
    os.chdir(workspace.root)
    try:
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, is_part)
            for name in CASES:
                assert workspace.train(config=configured(workspace, name, alone=True)) == 0
    finally:
        os.chdir(before)
    return workspace


@pytest.mark.parametrize("name", CASES)
def test_two_processes_go_back_as_one_does(name: str, trained: Workspace) -> None:
    events, alone = ([x for x in trained.metrics(run) if "event" in x] for run in (name, f"{name}-alone"))
    assert events == alone
    assert [(line["step"], line["diverged_step"], line["skipped"]) for line in events] == [(3, 5, True)]
    steps, same = ([x["step"] for x in trained.metrics(run) if "loss" in x] for run in (name, f"{name}-alone"))
    assert steps == same
    weights, reference = (weights_in(trained.directory(run) / "model") for run in (name, f"{name}-alone"))
    assert weights.keys() == reference.keys() != set()
    bits = torch.finfo(next(iter(reference.values())).dtype).eps
    for key, tensor in reference.items():
        torch.testing.assert_close(weights[key], tensor, rtol=4 * bits, atol=max(1e-5, bits / 8))
