"""What the CPU promises, on CUDA: the same directions, runs that resume, steps that do not wait, little memory."""

from typing import Any

import pytest
import torch
from torch import nn

from scripts.benchmarks.memory_probe import peak_memory
from scripts.benchmarks.methods import build_ours, mean_loss, objective_of, spsa
from scripts.benchmarks.setting import Setting
from tests.tiny import tiny_llama
from tests.workspace import ADAMW, LORA, MEZO, VAMO, Workspace, merged
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.offload import Shelf
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import Perturber
from vamo_ft.core.streaming import LayerStream
from vamo_ft.core.transfer import to_device
from vamo_ft.core.types import Estimate, Work
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.update_rules import DenseRule, build_optimizer
from vamo_ft.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

KEYS = [HashKey(5, Domain.DIRECTION, 2, probe) for probe in range(3)]


def flat(numel: int, device: str, dtype: torch.dtype) -> TrainableParameters:
    module = nn.Module()
    values = torch.linspace(-2, 2, numel, dtype=torch.float64).to(dtype)
    module.values = nn.Parameter(values.to(device))
    return TrainableParameters(module)


def moved(device: str, *, dtype: torch.dtype, distribution: Any, compiled: bool) -> torch.Tensor:
    parameters = flat(3 * 65536 + 17, device, dtype)
    directions = HashedDirections(parameters, distribution=distribution, compile_kernels=compiled)
    coefficients = torch.tensor([0.01, -0.3, 0.2], dtype=torch.float64, device=device)
    directions.axpy_(parameters.tensors, coefficients, KEYS, rounding=KEYS[0]._replace(domain=Domain.ROUNDING))
    return parameters.tensors[0].detach().cpu()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rademacher_steps_are_those_of_the_cpu_bit_for_bit(dtype: torch.dtype, compiled: bool) -> None:
    expected = moved("cpu", dtype=dtype, distribution="rademacher", compiled=False)
    assert torch.equal(moved("cuda", dtype=dtype, distribution="rademacher", compiled=compiled), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_gaussian_steps_are_those_of_the_cpu_to_rounding(compiled: bool) -> None:
    expected = moved("cpu", dtype=torch.float32, distribution="gaussian", compiled=False)
    actual = moved("cuda", dtype=torch.float32, distribution="gaussian", compiled=compiled)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_random_bits_are_those_of_the_cpu() -> None:
    bits = [random_bits(KEYS[0], 100, 200_000, device=torch.device(name)).cpu() for name in ("cpu", "cuda")]
    assert torch.equal(*bits)


def test_probe_points_leave_the_weights_and_take_one_layer() -> None:
    model = tiny_llama().to("cuda")
    model.config.use_cache = False
    parameters = TrainableParameters(model)
    before = parameters.digest()
    perturber = Perturber(model, parameters, HashedDirections(parameters))
    ids = torch.arange(3, 43, device="cuda").view(2, 20)

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    plain = evaluate()
    with perturber.at(KEYS[0], 1e-2):
        assert not torch.equal(perturber.checked(evaluate), plain)
    assert parameters.digest() == before
    assert torch.equal(evaluate(), plain)


def test_pinned_copies_arrive() -> None:
    values = torch.arange(1000.0)
    assert torch.equal(to_device(values, torch.device("cuda")).cpu(), values)


def test_fused_adamw_is_torchs_and_its_state_comes_back() -> None:
    def rule(parameters: TrainableParameters) -> DenseRule:
        carriers = Carriers(parameters, seed=0)
        optimizer = build_optimizer(carriers, name="adamw", weight_decay=0.0)
        assert optimizer.defaults["fused"]
        return DenseRule(carriers, None, optimizer, max_grad_norm=None)

    ours, plain = flat(1000, "cuda", torch.float32), flat(1000, "cuda", torch.float32)
    reference = torch.optim.AdamW(plain.tensors, lr=0.01, weight_decay=0.0, foreach=False, fused=False)
    used = rule(ours)
    for step in range(4):
        if step == 2:
            state = {name: {k: v.cpu() for k, v in part.items()} for name, part in used.state_dict().items()}
            used = rule(ours)
            used.load_state_dict(state)
        for parameters in (ours, plain):
            parameters.tensors[0].grad = torch.linspace(-1, 1, 1000, device="cuda") * (step + 1)
        used.apply(Estimate(torch.zeros(()), Work()), learning_rate=0.01, step=step)
        reference.step()
    torch.testing.assert_close(ours.tensors[0], plain.tensors[0], rtol=1e-6, atol=1e-7)


def test_an_offloaded_tensor_is_pinned_lent_and_written_back() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.arange(1 << 20, dtype=torch.float32, device=device).view(4, -1)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        shelf = Shelf((values * factor for factor in (1, 2, 3)), device=device, offload=True)
        borrowed = shelf[1]
        borrowed += 1
        shelf[1] = borrowed
        shelf.write(2, 0, values[3])
        lent = [tensor.sum() for tensor in shelf]
        del borrowed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() - before < values.nbytes
    first, second, third = shelf.state()
    assert all(tensor.is_pinned() for tensor in (first, second, third))
    assert torch.equal(first, values.cpu())
    assert torch.equal(second, 2 * values.cpu() + 1)
    assert torch.equal(third, torch.cat([values[3:], 3 * values[1:]]).cpu())
    assert all(tensor.device == device for tensor in lent)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_bitsandbytes_comes_back(name: Any, dtype: torch.dtype) -> None:
    def rule(parameters: TrainableParameters) -> DenseRule:
        carriers = Carriers(parameters, seed=0)
        return DenseRule(carriers, None, build_optimizer(carriers, name=name, weight_decay=0.0), max_grad_norm=None)

    whole, ours = flat(300_000, "cuda", dtype), flat(300_000, "cuda", dtype)
    used, other = rule(ours), rule(whole)
    for step in range(4):
        if step == 2:
            used_before = used.state_dict()["values"]
            state = {"values": {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in used_before.items()}}
            used = rule(ours)
            used.load_state_dict(state)
            assert getattr(used.state_dict()["values"]["state1"], "is_paged", False) == name.startswith("paged")
        for each, parameters in ((used, ours), (other, whole)):
            parameters.tensors[0].grad = (torch.linspace(-1, 1, 300_000, device="cuda") * (step + 1)).to(dtype)
            each.apply(Estimate(torch.zeros(()), Work()), learning_rate=0.01, step=step)
    assert torch.equal(ours.tensors[0], whole.tensors[0])
    assert not torch.equal(ours.tensors[0], flat(300_000, "cuda", dtype).tensors[0])


RUNS: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "vamo": VAMO,
    "mezo": merged(MEZO, {"optimizer": {"learning_rate": 1e-4}}),
    "mezo_bfloat16": merged(MEZO, {"model": {"dtype": "bfloat16"}, "optimizer": {"learning_rate": 1e-4}}),
    "zo_adam": merged(MEZO, {"method": {"name": "zo_adam"}}),
    "svrg": {"method": {"name": "svrg"}, "optimizer": {"name": "sgd", "learning_rate": 0.01}},
    "svrg_offloaded": {
        "method": {"name": "svrg", "snapshot": {"every": "4 steps", "offload": True}},
        "optimizer": {"name": "sgd", "learning_rate": 0.01},
    },
    "informed_offloaded": {
        "model": {"adapter": LORA},
        "method": {
            "name": "vamo",
            "probes": 2,
            "directions": {"structure": "gradient_subspace", "warmup_steps": 3},
            "snapshot": {"every": "4 steps", "offload": True},
        },
    },
    "adamw_masters": merged(ADAMW, {"model": {"dtype": "bfloat16"}, "optimizer": {"master_weights": True}}),
    "adamw_8bit": {"optimizer": {"name": "adamw_8bit", "learning_rate": 0.01}},
    "qlora_paged": {
        "model": {"dtype": "bfloat16", "quantization": {"bits": 4}, "adapter": LORA},
        "optimizer": {"name": "paged_adamw_8bit", "learning_rate": 0.01},
    },
    "compiled": merged(VAMO, {"model": {"compile": True}}),
    "mezo_streamed": merged(MEZO, {"optimizer": {"learning_rate": 1e-4}, "training": {"stream_layers": True}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_resumes(name: str, workspace: Workspace) -> None:
    workspace.configure(merged(RUNS[name], {"training": {"steps": 6}}))
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.train("--set", "training.steps=3") == 0
    assert workspace.train() == 0
    losses = [[line["loss"] for line in workspace.metrics(run) if "loss" in line] for run in ("tiny", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "vamo", "svrg", "svrg_offloaded", "zo_svrg"])
def test_nothing_waits_within_an_estimate(name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods that ask nothing of their losses; with `eager`, for which transformers does not look for padding."""
    made = Trainer._update
    changes = merged(RUNS.get(name, merged(MEZO, {"method": {"name": name}})), {"training": {"steps": 5}})
    workspace.configure(merged(changes, {"model": {"attn_implementation": "eager"}}))

    def watched(self: Trainer, micro_batches: Any) -> Any:
        estimate = self.estimator.estimate

        def strict(batches: Any, step: int) -> Any:
            torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")  # earlier ones prove and allocate
            try:
                return estimate(batches, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        with monkeypatch.context() as patch:
            patch.setattr(self.estimator, "estimate", strict)
            return made(self, micro_batches)

    monkeypatch.setattr(Trainer, "_update", watched)
    assert workspace.train() == 0


STREAMED: dict[str, dict[str, Any]] = {
    "mezo": {},
    "mezo_probes_bfloat16": {
        "model": {"dtype": "bfloat16"},
        "method": {"probes": 2},
        "training": {"micro_batch_size": 2},
    },
    "mezo_bcd": {"method": {"name": "mezo_bcd"}},
    "lora": {"model": {"adapter": LORA}},
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_run_keeps_every_bit(name: str, workspace: Workspace) -> None:
    """Copies on a stream of their own come neither too early nor too late: losses and weights are those without."""
    workspace.configure(merged(merged(MEZO, {"training": {"steps": 12}}), STREAMED[name]))
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.train("--set", "training.stream_layers=true") == 0
    assert workspace.metrics() == workspace.metrics("whole")
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.seed_log() == workspace.seed_log("whole")


class Stack(nn.Module):
    """Sixteen layers of 2^22 elements, 16 MiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2048, 2048, bias=False) for _ in range(16)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@torch.no_grad()
def test_streamed_layers_are_pinned_on_the_host_and_two_of_them_on_the_device() -> None:
    device, module, hidden = torch.device("cuda", 0), Stack(), torch.ones(4, 2048)
    expected = module.double()(hidden.double())
    module.float()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stream = LayerStream(module, device)
    parameters = TrainableParameters(module, stream=stream)
    assert all(parameter.device.type == "cpu" and parameter.is_pinned() for parameter in module.parameters())
    for _ in range(3):
        actual = module(hidden.to(device))
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    parameters.change(range(16), lambda tensors, indices: [tensor.mul_(0.5) for tensor in tensors] and None)
    torch.testing.assert_close(module(hidden.to(device)), actual / 2**16, rtol=0, atol=0)  # halving is exact
    stream.end()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**24 + 2**26  # the products' workspace beside them
    torch.testing.assert_close(module.double()(hidden.double()), expected / 2**16, rtol=1e-9, atol=0)


def test_a_mezo_step_takes_little_more_than_inference() -> None:
    device = torch.device("cuda", 0)
    setting = Setting(model="auto", batch=4, length=64, labelled=2, repeats=1, warmup=0, device=device)
    model, batch = setting.build_model(torch.float32), setting.one_batch()
    with peak_memory(device) as inference:
        mean_loss(objective_of(model), batch)
    ours = build_ours(spsa(), model, setting.samples(4), setting)
    ours.step([batch])
    with peak_memory(device) as mezo:
        ours.step([batch])
    assert mezo.bytes < 1.2 * inference.bytes
