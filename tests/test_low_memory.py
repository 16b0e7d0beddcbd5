"""Runs with master weights, and with snapshots in host memory, from the file to the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_documents import README
from tests.test_plan import configured, planned
from tests.workspace import ADAMW, MEZO, PLAIN, Workspace, merged, weights_in
from vamo_ft.assemble import plan as planning
from vamo_ft.assemble import space
from vamo_ft.assemble.devices import Device
from vamo_ft.assemble.parts import build_outline
from vamo_ft.assemble.space import snapshot_bytes
from vamo_ft.cli import run
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.types import Estimate, ProjectedGradient, Work
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.update_rules import DenseRule, build_optimizer
from vamo_ft.training.checkpoint import newest_checkpoint
from vamo_ft.training.space import tensor_bytes

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


def readme_rows(heading: str) -> list[list[str]]:
    """The cells of a table of the README, by the first cell of its head."""
    table = README.replace("`", "").partition(f"\n| {heading} |")[2].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) > 4
    return rows


@pytest.mark.parametrize("row", readme_rows("optimizer.name"), ids=" ".join)
def test_bytes_of_a_trained_parameter_are_those_of_the_readme(row: list[str]) -> None:
    """Counted on the tensors of a step, of a matrix as large as those that count."""
    optimizer, dtype, masters, *figures = row
    name, _, zeroth = optimizer.partition(", ")
    network = torch.nn.Linear(1024, 256, bias=False, dtype=getattr(torch, dtype))
    parameters, kept = TrainableParameters(network), masters == "true"
    rule: DenseRule | ProjectedSgd
    if zeroth:
        rule = ProjectedSgd(
            parameters, HashedDirections(parameters), weight_decay=0, max_grad_norm=None, seed=0, master_weights=kept
        )
        key = HashKey(0, Domain.DIRECTION, 0, 0)
        estimate = Estimate(torch.zeros(()), Work(), ProjectedGradient(torch.ones(1, dtype=torch.float64), (key,)))
    else:
        carriers = Carriers(parameters, seed=0, master_weights=kept)
        rule = DenseRule(carriers, None, build_optimizer(carriers, name=name, weight_decay=0), max_grad_norm=None)  # type: ignore[arg-type]
        estimate = Estimate(torch.zeros(()), Work())
        parameters.gradients()
    gradient = sum(tensor.grad.nbytes for tensor in parameters.tensors if tensor.grad is not None)
    rule.apply(estimate, learning_rate=1e-3, step=0)
    held = [network.weight.nbytes, gradient, tensor_bytes(rule.state_dict())]
    found = [size / parameters.numel for size in (*held, sum(held))]
    assert found == pytest.approx(list(map(float, figures)), abs=0.01)


@pytest.mark.parametrize("row", readme_rows("a snapshot of"), ids=" ".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_a_snapshot_are_those_of_the_readme(row: list[str], dtype: str, workspace: Workspace) -> None:
    first, *others = row[0].split(", ")
    changes: dict[str, dict[str, Any]] = {
        "source: recompute": {"source": "recompute"},
        "gradient_subspace": {"probes": 4, "directions": {"structure": "gradient_subspace", "warmup_steps": 5}},
        "q = 4": {},
    }
    methods: list[dict[str, Any]] = [{"name": first}]
    for other in others:
        methods = [{**methods[0], **changes[other]}] if other in changes else [*methods, {"name": other}]
    for method in methods:
        if method["name"] == "vamo_literal":
            method["radius"] = 0.1
        config = configured(workspace, merged(PLAIN, {"method": method, "model": {"dtype": dtype}}))
        parameters = build_outline(config, use_cache=False).parameters
        figure = float(row[1 if dtype == "float32" else 2].split(" ")[0])
        assert snapshot_bytes(config, parameters, num_samples=0) == figure * parameters.numel
        if row[3].startswith("0"):
            config = configured(workspace, merged(PLAIN, {"method": {**method, "snapshot": {"offload": True}}}))
            assert planned(config, device_type="cuda").snapshot < 20 * (8 * 4 + 6), "no more than a table"


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
    here = planned(configured(workspace, merged(PLAIN, {"method": method})), device_type="cuda")
    config = configured(workspace, merged(PLAIN, {"method": {**method, "snapshot": {"offload": True}}}))
    there = planned(config, device_type="cuda")
    assert (here.host, here.snapshot) == (0, table + large * NUMEL)
    assert (there.host, there.snapshot) == (large * NUMEL, table)
    assert there.peak < here.peak
    assert planned(config) == here, "the CPU has one memory"
    if name != "vamo_informed":
        visiting = next(phase for phase in there.phases if phase.name in ("correction", "step") and phase.copies)
        assert visiting.copies == LENT


def test_the_command_tells_what_lies_on_the_host_and_what_could(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Device("a small GPU", 2**20, "cuda")
    monkeypatch.setattr(space, "_PAGED_FROM", 0)
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


def test_moments_of_eight_bits_are_advised_on_the_cpu_too(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vamo_ft.commands.plan.find_device", lambda gpu: Device("little memory", 2**10, "cpu"))
    workspace.configure()
    assert run(["plan", "config.yaml", "--methods", ""]) == 0
    text = capsys.readouterr().out
    assert "optimizer.name: adamw_8bit; " in text
    assert "paged" not in text


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
