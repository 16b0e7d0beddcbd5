"""Runs with weights or moments of few bits, by bitsandbytes on the CPU, from the file to the model."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import save_model_folder, tiny_gpt2, tiny_llama
from tests.workspace import ADAMW, LORA, MEZO, VAMO, Workspace, equal_weights, merged, weights_in
from vamo_ft.cli import run

EIGHT: dict[str, Any] = {"optimizer": {"name": "adamw_8bit"}}
QLORA: dict[str, Any] = {"model": {"dtype": "bfloat16", "quantization": {"bits": 4}, "adapter": LORA}}
INFORMED: dict[str, Any] = {
    "method": {
        "name": "vamo",
        "probes": 2,
        "directions": {"structure": "gradient_subspace", "warmup_steps": 3},
        "snapshot": {"every": "4 steps"},
    }
}
RUNS: dict[str, dict[str, Any]] = {
    "adamw_8bit": EIGHT,
    "adamw_8bit_bfloat16": merged(EIGHT, {"model": {"dtype": "bfloat16"}}),
    "adamw_8bit_masters": merged(EIGHT, {"model": {"dtype": "bfloat16"}, "optimizer": {"master_weights": True}}),
    "adamw_8bit_blocks": merged(
        MEZO, merged(EIGHT, {"method": {"name": "zo_adam", "directions": {"structure": "block"}}})
    ),
    "qlora": merged(QLORA, {"model": {"quantization": {"compute_dtype": "float32", "double_quant": False}}}),
    "qlora_checkpointed": merged(merged(QLORA, EIGHT), {"training": {"activation_checkpointing": True}}),
    "qlora_mezo": merged(QLORA, MEZO),
    "qlora_vamo": merged(QLORA, VAMO),
    "qlora_informed": merged(QLORA, INFORMED),
}


@pytest.fixture
def wide(workspace: Workspace) -> Workspace:
    """With rows as long as blocks of weights in 4 bits are."""
    save_model_folder(workspace.root / "model", tiny_llama(hidden=64))
    return workspace


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_bit_for_bit(name: str, wide: Workspace) -> None:
    """Through evaluations, and with another learning rate at every step."""
    wide.configure(merged(RUNS[name], {"schedule": {"warmup_steps": 12}, "training": {"steps": 14}}))
    assert wide.train("--set", "run.name=whole") == 0
    assert wide.train("--set", "training.steps=8") == 0
    assert wide.train() == 0
    assert wide.metrics() == wide.metrics("whole")
    assert wide.weights() == wide.weights("whole")


def test_an_adapter_on_four_bits_learns_and_is_used_everywhere(
    wide: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {**LORA, "r": 16, "alpha": 32, "target_modules": "all-linear"}
    wide.configure(merged(merged(QLORA, ADAMW), {"model": {"adapter": adapter}, "training": {"steps": 40}}))
    assert wide.train() == 0
    first, *_, last = [line["eval.loss"] for line in wide.metrics() if "eval.loss" in line]
    assert last < first - 1
    capsys.readouterr()
    assert run(["evaluate", "runs/tiny"]) == 0
    assert f"{last:.4f}" in capsys.readouterr().out
    assert run(["generate", "runs/tiny", "a fine film", "--max-new-tokens", "4"]) == 0
    assert run(["export", "runs/tiny", "merged", "--merge"]) == 0
    assert "merged into those they were made from" in capsys.readouterr().err
    merged_model = AutoModelForCausalLM.from_pretrained(wide.root / "merged")
    factors = weights_in(wide.directory() / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    key = f"base_model.{name.replace('model', 'model.model', 1).removesuffix('.weight')}"
    up, down = (factors[f"{key}.lora_{side}.weight"].double() for side in "BA")
    base = tiny_llama(hidden=64).get_parameter(name).to(torch.bfloat16)
    expected = (base.double() + 2 * up @ down).to(torch.bfloat16)
    torch.testing.assert_close(merged_model.get_parameter(name).to(torch.bfloat16), expected, rtol=1e-2, atol=1e-4)
    assert not torch.equal(merged_model.get_parameter(name).to(torch.bfloat16), base)


def test_work_and_parameters_are_counted_as_without_quantisation(
    wide: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = []
    for name, quantization in (("four", {"bits": 4}), ("whole", None)):
        wide.configure(merged(QLORA, {"run": {"name": name}, "model": {"quantization": quantization}}))
        assert wide.train() == 0
        (said,) = (line for line in capsys.readouterr().err.splitlines() if " trainable of " in line)
        counted.append(([line["flops"] for line in wide.metrics(name) if "flops" in line], said))
    assert counted[0] == counted[1]
    assert counted[0][0]


def test_a_seed_log_is_merged_into_the_weights_before_quantisation(wide: Workspace) -> None:
    """As the saved adapter is."""
    wide.configure(merged(QLORA, MEZO))
    assert wide.train() == 0
    assert run(["export", "runs/tiny", "replayed", "--from-seedlog", "model", "--merge"]) == 0
    assert run(["export", "runs/tiny", "merged", "--merge"]) == 0
    assert equal_weights(wide.root / "replayed", wide.root / "merged")


def test_an_adapter_on_transposed_matrices_is_merged(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """As GPT-2 has them, and its matrices in 4 bits have not."""
    save_model_folder(workspace.root / "model", tiny_gpt2(hidden=64))
    workspace.configure(merged(QLORA, {"model": {"adapter": {**LORA, "target_modules": ["c_attn"]}}}))
    assert workspace.train() == 0
    assert run(["export", "runs/tiny", "merged", "--merge"]) == 0
    assert "logits differ by at most" in capsys.readouterr().err
    merged_model = AutoModelForCausalLM.from_pretrained(workspace.root / "merged")
    factors = weights_in(workspace.directory() / "model")
    key = "base_model.model.transformer.h.1.attn.c_attn"
    up, down = (factors[f"{key}.lora_{side}.weight"].double() for side in "BA")
    base = tiny_gpt2(hidden=64).get_parameter("transformer.h.1.attn.c_attn.weight").to(torch.bfloat16)
    expected = (base.double() + 2 * (up @ down).T).to(torch.bfloat16)
    found = merged_model.get_parameter("transformer.h.1.attn.c_attn.weight").to(torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)
    assert not torch.equal(found, base)


def test_a_plan_refuses_rows_that_the_run_would(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(QLORA)
    assert workspace.train() == run(["plan", "config.yaml", "--methods", ""]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "has rows of 32 weights" in line]
    assert len(said) == 2
    assert said[0] == said[1]
