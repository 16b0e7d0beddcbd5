"""Runs on a base whose files hold weights in 4 bits, from the file to the model."""

import json
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM

from tests.tiny import save_in_four_bits, save_model_folder, tiny_gpt2, tiny_llama
from tests.workspace import ADAMW, LORA, MEZO, VAMO, Workspace, equal_weights, merged, weights_in
from vamo_ft.assemble.memory import MemoryPlanner
from vamo_ft.assemble.parts import build_outline, build_parts
from vamo_ft.cli import run
from vamo_ft.config.load import load_config
from vamo_ft.core.allocations import AllocationTrace
from vamo_ft.estimators.first_order import FirstOrder

STORED: dict[str, Any] = {"model": {"path": "stored", "dtype": "bfloat16", "adapter": LORA}}
QUANTIZED: dict[str, Any] = merged(STORED, {"model": {"path": "model", "quantization": {"bits": 4}}})


@pytest.fixture
def stored(workspace: Workspace) -> Workspace:
    save_model_folder(workspace.root / "model", tiny_llama(hidden=64))
    save_in_four_bits(workspace.root / "stored", workspace.root / "model")
    return workspace


@pytest.mark.parametrize("method", [ADAMW, MEZO, VAMO], ids=["adamw", "mezo", "vamo"])
def test_a_run_is_that_on_a_base_quantised_when_loaded(method: dict[str, Any], stored: Workspace) -> None:
    """Bit for bit, and so is one that went on from a checkpoint."""
    longer = {"training": {"steps": 10}, "schedule": {"warmup_steps": 9}}
    stored.configure(merged(merged(QUANTIZED, method), longer))
    assert stored.train("--set", "run.name=quantised") == 0
    stored.configure(merged(merged(STORED, method), longer))
    assert stored.train("--set", "run.name=whole") == 0
    assert stored.train("--set", "training.steps=8") == 0
    assert stored.train() == 0
    for name in ("whole", "tiny"):
        assert stored.metrics(name) == stored.metrics("quantised")
        assert stored.weights(name) == stored.weights("quantised")


def test_it_is_used_everywhere(stored: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    stored.configure(merged(STORED, ADAMW))
    assert stored.train() == 0
    assert "stored is stored in 4 bits: nf4 with quantised scales, products in bfloat16\n" in capsys.readouterr().err
    last = [line["eval.loss"] for line in stored.metrics() if "eval.loss" in line][-1]
    assert run(["evaluate", "runs/tiny"]) == 0
    assert f"{last:.4f}" in capsys.readouterr().out
    for target in ("runs/tiny", "runs/tiny/model", "stored"):  # the run, its adapter alone, and the base
        assert run(["generate", target, "a fine film", "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out.strip()
    assert run(["export", "runs/tiny", "adapter"]) == 0
    assert equal_weights(stored.root / "adapter", stored.directory() / "model")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_is_merged_into_what_the_bits_stand_for(
    architecture: str, stored: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's matrices are transposed, and in 4 bits they are not."""
    name, target = "model.layers.1.self_attn.q_proj", "q_proj"
    if architecture == "gpt2":
        save_model_folder(stored.root / "plain", tiny_gpt2(hidden=64))
        save_in_four_bits(stored.root / "stored", stored.root / "plain")
        name, target = "transformer.h.1.attn.c_attn", "c_attn"
    changes = {"model": {"adapter": {"target_modules": [target]}}, "optimizer": {"learning_rate": 0.1}}
    stored.configure(merged(merged(STORED, MEZO), changes))
    assert stored.train() == 0
    capsys.readouterr()
    assert run(["export", "runs/tiny", "merged", "--merge"]) == 0
    said = capsys.readouterr().err
    assert "the adapter is merged into the values that the 4 bits of stored stand for\n" in said
    assert run(["export", "runs/tiny", "replayed", "--merge", "--from-seedlog", "stored"]) == 0
    assert equal_weights(stored.root / "replayed", stored.root / "merged")
    assert "quantization_config" not in json.loads((stored.root / "merged" / "config.json").read_text())
    found = AutoModelForCausalLM.from_pretrained(stored.root / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(stored.root / "stored", dtype=torch.bfloat16)
    held = base.get_submodule(name).weight
    decoded = dequantize_4bit(held.data, held.quant_state).double()
    factors = weights_in(stored.directory() / "model")
    up, down = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "BA")
    expected = (decoded + 2 * up @ down).to(torch.bfloat16)
    weight = found.get_submodule(name).weight
    weight = weight.T if architecture == "gpt2" else weight
    torch.testing.assert_close(weight.to(torch.bfloat16), expected, rtol=1e-2, atol=1e-4)
    assert float((expected.double() - decoded).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": {"adapter": None}},
            "its weights are stored in 4 bits, and quantised weights are not trained; add model.adapter, or write the "
            "model that they were made from",
        ),
        (
            {"method": {"name": "forward_gradient"}, "model": {"attn_implementation": "eager"}},
            "its weights are stored in 4 bits, which counts as model.quantization; model.quantization: method.name: "
            "forward_gradient takes forward derivatives, which products with weights in 4 bits have none of on CUDA; "
            "leave it out, or write the model that they were made from",
        ),
        (
            merged(MEZO, {"training": {"stream_layers": True}}),
            "its weights are stored in 4 bits, which counts as model.quantization; training.stream_layers: "
            "model.quantization puts all layers on the device, in 4 bits; leave one of the two out, or write the model "
            "that they were made from",
        ),
        (
            {"training": {"fsdp": True}},
            "its weights are stored in 4 bits, which counts as model.quantization; training.fsdp: model.quantization "
            "does not go with it; leave one of them out, or write the model that they were made from",
        ),
    ],
)
def test_what_quantised_weights_do_not_do_is_refused(
    changes: dict[str, Any], said: str, stored: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    stored.configure(merged(STORED, changes))
    for command in (["train", "config.yaml"], ["plan", "config.yaml", "--methods", ""]):
        assert run(command) == 2
        assert f"error: model.path: stored: {said}\n" in capsys.readouterr().err


def test_a_plan_is_that_of_a_base_quantised_when_loaded(stored: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    (stored.root / "stored" / "model.safetensors").unlink()  # which it does not need
    plans = []
    for changes in (QUANTIZED, STORED):
        stored.configure(merged(changes, {"model": {"attn_implementation": "eager"}}))
        assert run(["plan", "config.yaml", "--methods", "mezo,forward_gradient"]) == 0
        plans.append(capsys.readouterr().out.splitlines())
    told = "stored is stored in 4 bits: nf4 with quantised scales, products in bfloat16"
    assert told in plans[1]
    measured = ("disk: ", "stop: ")
    quantised, found = ([line for line in lines if line != told and not line.startswith(measured)] for lines in plans)
    assert found == quantised
    assert any(line.startswith("forward_gradient: ") and "weights in 4 bits" in line for line in found)


def test_what_is_planned_is_held(stored: Workspace) -> None:
    """All but bitsandbytes' tables of codes, of a KiB a matrix."""
    stored.configure(STORED)
    config = load_config(stored.root / "config.yaml").config
    plan = MemoryPlanner(config, build_outline(config), device_type="cpu").plan(config, micro_batch_size=6)
    parts = build_parts(config, weights=None)
    model, held = parts.loaded.model, parts.loaded.four_bits
    assert held is not None
    tensors = [*model.parameters(), *model.buffers()]
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    tensors += [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]
    assert len(states) == 14
    assert plan.weights - held.present_bytes == AllocationTrace(tensors).now
    estimator = FirstOrder(parts.objective, parts.parameters, parts.runtime, seed=0)
    for _ in range(2):
        with AllocationTrace(tensors) as trace:
            before = trace.now
            estimator.estimate([parts.source.batch(range(6))], 0)
        parts.parameters.clear_gradients()
    (step,) = (phase for phase in plan.phases if phase.name == "step")
    assert 0.9 < (trace.peak - before) / (step.total + held.present_bytes) <= 1
