"""bitsandbytes' rules, on the CPU, which has all of them but for the paging."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from tests.config.examples import VALID, load_text
from tests.toys import TinyNetwork, normal
from tests.workspace import Workspace
from vamo_ft.assemble import method
from vamo_ft.assemble.devices import Device
from vamo_ft.assemble.space import optimizer_bytes, paged_bytes
from vamo_ft.cli import run
from vamo_ft.config.optimizer import BITSANDBYTES, PAGED, OptimizerConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.types import Estimate, Work
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.update_rules import DenseRule, build_optimizer
from vamo_ft.training.checkpoint import open_checkpoint, save_checkpoint
from vamo_ft.training.space import tensor_bytes

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")

CLASSES = {
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
}
NOTHING = Estimate(loss=torch.zeros(()), work=Work())


def build(name: str, parameters: TrainableParameters, *, masters: bool = False) -> tuple[DenseRule, Any]:
    carriers = Carriers(parameters, seed=7, master_weights=masters)
    optimizer = build_optimizer(carriers, name=name, weight_decay=0.1, betas=(0.8, 0.95))  # type: ignore[arg-type]
    return DenseRule(carriers, None, optimizer, max_grad_norm=None), optimizer


def apply(rule: DenseRule, parameters: TrainableParameters, step: int) -> None:
    for number, tensor in enumerate(parameters.tensors):
        tensor.grad = normal(*tensor.shape, seed=10 * step + number).to(tensor.dtype)
    rule.apply(NOTHING, learning_rate=1e-2, step=step)


def wide(dtype: torch.dtype = torch.float32) -> TrainableParameters:
    """A matrix of 120,000 elements, whose moments are quantised, or paged, and a bias of 3."""
    return TrainableParameters(TinyNetwork(40_000, dtype=dtype))


def test_every_name_has_a_class() -> None:
    assert set(CLASSES) == set(BITSANDBYTES)


@pytest.mark.parametrize("name", CLASSES)
def test_the_rule_is_bitsandbytes_with_our_settings(name: str) -> None:
    parameters = wide()
    _, optimizer = build(name, parameters)
    assert type(optimizer) is CLASSES[name]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0], "the bias does not decay"
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)


@pytest.mark.parametrize(("name", "tolerance"), [("paged_adamw_32bit", 1e-5), ("adamw_8bit", 0.02)])
def test_the_update_is_adamws(name: str, tolerance: float) -> None:
    """Of what the weights have moved after 20 steps; the small bias has float32 moments either way."""
    parameters, reference = wide(), wide(torch.float64)
    reference.assign([tensor.detach().double() for tensor in parameters.tensors])
    before = [tensor.detach().double() for tensor in parameters.tensors]
    rule, _ = build(name, parameters)
    groups = [{"params": [tensor], "weight_decay": 0.1 * (tensor.ndim > 1)} for tensor in reference.tensors]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
    for step in range(20):
        apply(rule, parameters, step)
        for number, tensor in enumerate(reference.tensors):
            tensor.grad = normal(*tensor.shape, seed=10 * step + number).float().double()
        plain.step()
    for tensor, expected, first in zip(parameters.tensors, reference.tensors, before, strict=True):
        error = (tensor - expected).norm() / (expected - first).norm()
        assert error < (tolerance if tensor.ndim > 1 else 1e-5)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_takes_the_state_and_gives_it_back(
    name: str, dtype: torch.dtype, masters: bool, tmp_path: Path
) -> None:
    """Codes, scales and tables go through safetensors, and the run goes on bit for bit."""
    parameters = wide(dtype)
    rule, _ = build(name, parameters, masters=masters)
    for step in range(3):
        apply(rule, parameters, step)
    save_checkpoint(
        tmp_path,
        step=3,
        owners={"update_rule": rule.state_dict()},
        save_model=lambda folder: None,
        facts={},
        keep=1,
    )
    saved = open_checkpoint(tmp_path / "step-00000003").load("update_rule")
    weight = saved["layer.weight"]
    assert weight["state1"].dtype == (torch.uint8 if name.endswith("8bit") else torch.float32)
    assert weight["step"] == 3
    again = wide(dtype)
    again.assign([tensor.detach().clone() for tensor in parameters.tensors])
    other, _ = build(name, again, masters=masters)
    other.load_state_dict(saved)
    for step in range(3, 6):
        apply(rule, parameters, step)
        apply(other, again, step)
    assert again.digest() == parameters.digest()


def test_a_state_of_another_kind_is_refused() -> None:
    parameters = wide()
    eight, _ = build("adamw_8bit", parameters)
    apply(eight, parameters, 0)
    plain, _ = build("paged_adamw_32bit", parameters)
    with pytest.raises(ValueError, match="the optimizer keeps state1, state2, step, not absmax1, absmax2, qmap1"):
        plain.load_state_dict(eight.state_dict())
    narrow = TrainableParameters(TinyNetwork(1500))
    other, _ = build("adamw_8bit", narrow)
    with pytest.raises(ValueError, match=r"the optimizer's state1 is torch\.uint8 \(3, 1500\)"):
        other.load_state_dict(eight.state_dict())


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "sign_sgd", *CLASSES])
def test_the_bytes_that_are_planned_are_those_of_the_state(name: str, masters: bool) -> None:
    parameters = wide(torch.bfloat16)
    rule, _ = build(name, parameters, masters=masters)
    apply(rule, parameters, 0)
    config = OptimizerConfig(name=name, learning_rate=1.0, master_weights=masters)  # type: ignore[arg-type]
    counters = 2 * 4 if name in ("adamw", "adagrad") else 0  # steps, as torch counts them
    assert tensor_bytes(rule.state_dict()) == optimizer_bytes(config, parameters) + counters
    paged = {"paged_adamw_8bit": 2 * 120_000, "paged_adamw_32bit": 2 * 4 * 120_000}
    assert paged_bytes(config, parameters) == paged.get(name, 0)
    assert paged.keys() == PAGED.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_a_missing_package_is_named_before_anything_is_loaded(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"optimizer": {"name": name}})
    (workspace.root / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(method, "find_spec", lambda name: None)
    assert workspace.train() == 2
    said = f"error: optimizer.name: {name} needs another package: pip install 'vamo-ft[bitsandbytes]'"
    assert said in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("name", "instead"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", "adamw")])
def test_nothing_is_paged_without_cuda(
    name: str,
    instead: str,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace.configure({"optimizer": {"name": name}})
    (workspace.root / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workspace.train() == 2
    said = f"error: optimizer.name: {name} needs a CUDA device, and there is none; write {instead}"
    assert said in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("name", "instead"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", "adamw")])
def test_a_plan_for_main_memory_has_no_paging(
    name: str, instead: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vamo_ft.commands.plan.find_device", lambda gpu: Device("main memory", 2**30, "cpu"))
    config = workspace.configure({"optimizer": {"name": name}})
    assert run(["plan", config, "--methods", ""]) == 2
    said = f"error: optimizer.name: {name} needs a CUDA device; write {instead}, or plan for one with --gpu"
    assert said in capsys.readouterr().err.splitlines()
    monkeypatch.setattr("vamo_ft.commands.plan.find_device", lambda gpu: Device("a GPU", 2**30, "cuda"))
    assert run(["plan", config, "--methods", ""]) == 0


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_had_no_gradient_yet_begins_after_the_restore(dtype: torch.dtype, masters: bool) -> None:
    """As the blocks of a run do that takes one a step."""
    parameters, again = wide(dtype), wide(dtype)
    rule, _ = build("adamw_8bit", parameters, masters=masters)
    weight = parameters.names.index("layer.weight")
    parameters.tensors[1 - weight].grad = normal(*parameters.tensors[1 - weight].shape, seed=1).to(dtype)
    rule.apply(NOTHING, learning_rate=1e-2, step=0)
    saved = rule.state_dict()
    assert saved.get("layer.weight", {}).keys() == ({"master"} if masters and dtype == torch.bfloat16 else set())
    again.assign([tensor.detach().clone() for tensor in parameters.tensors])
    other, _ = build("adamw_8bit", again, masters=masters)
    other.load_state_dict(saved)
    before = again.tensors[weight].detach().clone()
    for step in range(1, 4):
        apply(rule, parameters, step)
        apply(other, again, step)
    assert again.digest() == parameters.digest()
    assert not torch.equal(again.tensors[weight], before)


def test_master_weights_of_float32_parameters_are_refused_where_only_the_model_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter's are whose modules_to_save are frozen."""
    monkeypatch.chdir(tmp_path)
    config = load_text(VALID, "model.dtype=bfloat16", "optimizer.master_weights=true").config
    with pytest.raises(UsageError, match=r"^optimizer\.master_weights: all trained parameters are float32 themselves"):
        method.build_update_rule(config, wide(), None)
