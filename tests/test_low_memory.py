"""Runs with master weights, and with snapshots in host memory, from the file to the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_plan import configured, planned, real
from tests.workspace import ADAMW, MEZO, PLAIN, Workspace, merged, weights_in
from vamo_ft.assemble import plan as planning
from vamo_ft.assemble.devices import Device
from vamo_ft.assemble.memory import MemoryPlanner
from vamo_ft.assemble.method import build_update_rule
from vamo_ft.assemble.parts import build_outline
from vamo_ft.cli import run
from vamo_ft.core.types import Estimate, Work
from vamo_ft.training.checkpoint import newest_checkpoint

LOW: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "optimizer": {"master_weights": True}}
INFORMED: dict[str, Any] = {
    "method": {"name": "vamo", "probes": 2, "directions": {"structure": "gradient_subspace", "warmup_steps": 3}}
}


def masters(workspace: Workspace) -> dict[str, Tensor]:
    checkpoint = newest_checkpoint(workspace.directory() / "checkpoints")
    assert checkpoint is not None
    return {name: each["master"] for name, each in checkpoint.load("update_rule").items()}


@pytest.mark.parametrize("changes", [ADAMW, MEZO], ids=["adamw", "mezo"])
def test_the_model_is_the_rounding_of_the_masters(workspace: Workspace, changes: dict[str, Any]) -> None:
    workspace.configure(merged(changes, LOW))
    assert workspace.train() == 0
    model, kept = weights_in(workspace.directory() / "model"), masters(workspace)
    assert kept.keys() == model.keys()
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}
    assert all(torch.equal(kept[name].bfloat16(), model[name]) for name in model)
    assert any(not torch.equal(kept[name], model[name].float()) for name in model)


def test_masters_go_on_under_another_optimizer(workspace: Workspace) -> None:
    workspace.configure(merged(merged(ADAMW, LOW), {"method": {"name": "first_order"}, "training": {"steps": 3}}))
    assert workspace.train() == 0
    before = masters(workspace)
    (folder,) = (workspace.directory() / "checkpoints").iterdir()
    other = ("optimizer.name=sgd", "optimizer.learning_rate=1e-30", "training.steps=4")
    arguments = [argument for setting in other for argument in ("--set", setting)]
    assert workspace.train(*arguments, "--resume", str(folder), "--allow-changes") == 0
    after = masters(workspace)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "the state of the optimizer is dropped" in (workspace.directory() / "log.txt").read_text()


def test_a_seed_log_of_masters_is_not_replayed_without_them(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(MEZO, LOW))
    assert workspace.train() == 0
    export = ["export", "runs/tiny", "out", "--from-seedlog", "model"]
    assert run([*export, "--set", "optimizer.master_weights=false"]) == 2
    assert "belongs to a run with another master_weights than config.yaml beside it" in capsys.readouterr().err


def test_where_a_snapshot_lies_may_change_on_the_way(workspace: Workspace) -> None:
    svrg = {"name": "svrg", "alpha_decay": "none", "snapshot": {"every": "4 steps"}}
    workspace.configure(merged(PLAIN, {"method": svrg}))
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.train("--set", "training.steps=5") == 0
    assert workspace.train("--set", "method.snapshot.offload=true") == 0
    assert workspace.weights() == workspace.weights("whole")


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_bytes_of_a_parameter_are_those_of_the_readme(workspace: Workspace, name: str, masters: bool) -> None:
    """bfloat16 weights and gradients take 2, each float32 moment 4, and a master 4: as the tensors of a step do."""
    optimizer = {"name": name, "learning_rate": 1e-3, "master_weights": masters}
    config = configured(workspace, merged(PLAIN, {**LOW, "method": {"name": name}, "optimizer": optimizer}))
    loaded = real(config)
    parameters, rule = loaded.parameters, build_update_rule(config, loaded.parameters, None)
    parameters.gradients()
    rule.apply(Estimate(torch.zeros(()), Work()), learning_rate=1e-3, step=0)
    kept = [value for each in rule.state_dict().values() for value in each.values() if value.ndim > 0]
    weights = sum(tensor.nbytes for tensor in parameters.tensors)
    state = sum(tensor.nbytes for tensor in kept)
    assert weights == 2 * parameters.numel
    assert state == parameters.numel * {"adamw": 8, "sgd": 0}[name] + parameters.numel * 4 * masters
    assert planned(config).optimizer == state


NUMEL = 35_168  # of the tiny model
LENT = 2 * 259 * 32 * 4  # bytes of head and embedding, neighbours in the order of names

OFFLOADED: dict[str, tuple[dict[str, Any], int, int]] = {
    "svrg": ({"name": "svrg"}, 8, 0),
    "vamo_literal": ({"name": "vamo_literal", "radius": 0.1}, 8, 0),
    "zo_svrg": ({"name": "zo_svrg"}, 4, 0),
    "vamo_recompute": ({"name": "vamo", "source": "recompute"}, 4, 20 * (8 + 5)),
    "vamo_informed": (INFORMED["method"], 4 * 7, 20 * (2 * 8 + 5)),
}
"""Method -> bytes of each of d elements that a snapshot keeps, and bytes of its table."""


@pytest.mark.parametrize("name", OFFLOADED)
def test_what_is_offloaded_is_planned_in_host_memory(workspace: Workspace, name: str) -> None:
    method, large, table = OFFLOADED[name]
    here = planned(configured(workspace, merged(PLAIN, {"method": method})))
    config = configured(workspace, merged(PLAIN, {"method": {**method, "snapshot": {"offload": True}}}))
    there = planned(config)
    assert (here.host, here.snapshot) == (0, table + large * NUMEL)
    assert (there.host, there.snapshot) == (large * NUMEL, table)
    assert there.peak < here.peak
    on_host = MemoryPlanner(config, build_outline(config, use_cache=False), on_host=True)
    assert on_host.plan(config, micro_batch_size=6) == here, "the CPU has one memory"
    if name != "vamo_informed":
        visiting = next(phase for phase in there.phases if phase.name in ("correction", "step") and phase.copies)
        assert visiting.copies == LENT


def test_the_command_tells_what_lies_on_the_host_and_what_could(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Device("a small GPU", 2**20)
    monkeypatch.setattr("vamo_ft.commands.plan.find_device", lambda gpu: small)
    svrg = {"method": {"name": "svrg"}, "optimizer": {"name": "adamw", "learning_rate": 1e-3}}
    config = workspace.configure(merged(merged(PLAIN, svrg), LOW))
    assert run(["plan", config, "--methods", "mezo"]) == 0
    text = capsys.readouterr().out
    assert "optimizer.name: adamw_8bit, or paged_adamw_8bit; optimizer.master_weights: false" in text
    assert f"method.snapshot.offload: true ({6 * NUMEL / 2**20:.1f} MiB)" in text
    offloaded = ["--set", "method.snapshot.offload=true", "--set", "optimizer.name=paged_adamw_32bit"]
    assert run(["plan", config, "--methods", "mezo", *offloaded]) == 0
    text = capsys.readouterr().out
    assert f"in host memory, or able to move there: {(6 + 8) * NUMEL / 2**20:.1f} MiB" in text
    assert "method.snapshot.offload: true" not in text


def test_a_checkpoint_of_masters_is_counted_before_the_first_step(workspace: Workspace) -> None:
    config = configured(workspace, merged(PLAIN, LOW | {"optimizer": {"learning_rate": 1e-3, "master_weights": True}}))
    parts = build_outline(config, use_cache=False)
    disk = planning._disk(config, parts)
    assert workspace.train() == 0
    (largest,) = [sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in [newest(workspace)]]
    small = 2**24  # room for small files
    assert disk.checkpoint - small - 20_000 < largest < disk.checkpoint
    assert disk.checkpoint - small == pytest.approx((2 + 8 + 4) * NUMEL, rel=0.02)


def newest(workspace: Workspace) -> Any:
    checkpoint = newest_checkpoint(workspace.directory() / "checkpoints")
    assert checkpoint is not None
    return checkpoint.path
