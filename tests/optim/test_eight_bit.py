"""bitsandbytes' rules, as far as a machine without CUDA can tell: over a stand-in with their constructors and state."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.config.examples import VALID, load_text
from tests.eight_bits import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit, stand_in
from tests.toys import TinyNetwork, normal
from tests.workspace import Workspace
from vamo_ft.assemble import method
from vamo_ft.assemble.space import optimizer_bytes, paged_bytes
from vamo_ft.config.optimizer import BITSANDBYTES, OptimizerConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.types import Estimate, Work
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.update_rules import DenseRule, build_optimizer
from vamo_ft.training.checkpoint import open_checkpoint, save_checkpoint
from vamo_ft.training.space import tensor_bytes

CLASSES = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit, "paged_adamw_32bit": PagedAdamW32bit}
NOTHING = Estimate(loss=torch.zeros(()), work=Work())


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in())


def build(name: str, parameters: TrainableParameters, *, masters: bool = False) -> tuple[DenseRule, Any]:
    carriers = Carriers(parameters, seed=7, master_weights=masters)
    optimizer = build_optimizer(carriers, name=name, weight_decay=0.1, betas=(0.8, 0.95))  # type: ignore[arg-type]
    return DenseRule(carriers, None, optimizer, max_grad_norm=None), optimizer


def apply(rule: DenseRule, parameters: TrainableParameters, step: int) -> None:
    for number, tensor in enumerate(parameters.tensors):
        tensor.grad = normal(*tensor.shape, seed=10 * step + number).to(tensor.dtype)
    rule.apply(NOTHING, learning_rate=1e-2, step=step)


def wide(dtype: torch.dtype = torch.float32) -> TrainableParameters:
    """A matrix of 6,000 elements, whose moments are quantised, and a bias of 3."""
    return TrainableParameters(TinyNetwork(2000, dtype=dtype))


def test_every_name_has_a_class() -> None:
    assert set(CLASSES) == set(BITSANDBYTES)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", CLASSES)
def test_the_rule_is_bitsandbytes_with_our_settings(name: str) -> None:
    parameters = wide()
    _, optimizer = build(name, parameters)
    assert type(optimizer) is CLASSES[name]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0], "the bias does not decay"
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_takes_the_state_and_gives_it_back(
    name: str, dtype: torch.dtype, masters: bool, tmp_path: Path
) -> None:
    """Codes, scales and tables through safetensors; paged buffers are paged again; the run goes on bit for bit."""
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
    other, optimizer = build(name, again, masters=masters)
    other.load_state_dict(saved)
    paged = {state["state1"].is_paged for state in optimizer.state.values()}
    assert paged == {name.startswith("paged")}
    for step in range(3, 6):
        apply(rule, parameters, step)
        apply(other, again, step)
    assert again.digest() == parameters.digest()


@pytest.mark.usefixtures("_installed")
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


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "sign_sgd", *CLASSES])
def test_the_bytes_that_are_planned_are_those_of_the_state(name: str, masters: bool) -> None:
    parameters = wide(torch.bfloat16)
    rule, _ = build(name, parameters, masters=masters)
    apply(rule, parameters, 0)
    config = OptimizerConfig(name=name, learning_rate=1.0, master_weights=masters)  # type: ignore[arg-type]
    counters = 2 * 4 if name in ("adamw", "adagrad") else 0  # steps, as torch counts them
    assert tensor_bytes(rule.state_dict()) == optimizer_bytes(config, parameters) + counters
    moments = optimizer_bytes(config, parameters) - (4 * 6003 if masters else 0)
    assert paged_bytes(config, parameters) == (moments if name.startswith("paged") else 0)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_missing_is_named_before_anything_is_loaded(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"optimizer": {"name": name}})
    (workspace.root / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for found, said in (
        (None, f"error: optimizer.name: {name} needs another package: pip install 'vamo-ft[bitsandbytes]'"),
        (object(), f"error: optimizer.name: {name} needs a CUDA device, and there is none; write adamw"),
    ):
        monkeypatch.setattr(method, "find_spec", lambda name, found=found: found)
        assert workspace.train() == 2
        assert said in capsys.readouterr().err.splitlines()


def test_master_weights_of_float32_parameters_are_refused_where_only_the_model_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter's are whose modules_to_save are frozen."""
    monkeypatch.chdir(tmp_path)
    config = load_text(VALID, "model.dtype=bfloat16", "optimizer.master_weights=true").config
    with pytest.raises(UsageError, match=r"^optimizer\.master_weights: all trained parameters are float32 themselves"):
        method.build_update_rule(config, wide(), None)
