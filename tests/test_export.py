"""`vamo-ft export`: plain Hugging Face folders from runs and checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_model_folder, tiny_llama
from tests.workspace import LORA, PLAIN, Workspace, equal_weights, export, merged, weights_in
from vamo_ft.models.export import quietly


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_and_merged_model_load_with_nothing_of_ours(
    workspace: Workspace, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(
        merged(PLAIN, {"model": {"adapter": LORA, "dtype": dtype}, "optimizer": {"learning_rate": 0.05}})
    )
    assert workspace.train() == 0
    assert export("runs/tiny", "adapter") == 0
    assert export("runs/tiny", "whole", "--merge") == 0
    assert "logits differ by at most" in capsys.readouterr().err
    base = load_file(Path("model") / "model.safetensors")
    adapter, whole = weights_in(Path("adapter")), weights_in(Path("whole"))
    assert equal_weights(Path("adapter"), workspace.directory() / "model")
    assert base.keys() == whole.keys()
    for name, tensor in whole.items():
        expected = base[name].to(getattr(torch, dtype)).float()
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in adapter:
            delta = adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"] * (LORA["alpha"] / LORA["r"])
            assert delta.abs().max() > 1e-3
            expected = expected + delta
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.allclose(tensor.float(), expected.to(tensor.dtype).float(), atol=1e-7, rtol=2**-8)
    plain = AutoModelForCausalLM.from_pretrained("whole", dtype=torch.float32)
    with quietly():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "adapter")
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-5 if dtype == "float32" else 2e-2)
    assert not torch.allclose(logits(plain), logits(AutoModelForCausalLM.from_pretrained("model")), atol=5e-2)
    assert AutoTokenizer.from_pretrained("whole")("a cat")["input_ids"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_merge_that_changes_the_model_is_refused(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapted head that is tied to an embedding which is not adapted: no one weight can be both."""
    save_model_folder(Path("tied"), tiny_llama(tied=True))
    adapter = {**LORA, "target_modules": ["lm_head"]}
    workspace.configure(
        merged(PLAIN, {"model": {"path": "tied", "adapter": adapter}, "optimizer": {"learning_rate": 0.05}})
    )
    assert workspace.train() == 0
    capsys.readouterr()
    assert export("runs/tiny", "out", "--merge") == 2
    assert "export the adapter without --merge" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_checkpoint_is_verified_and_gets_a_card(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained.directory() / "checkpoints" / "step-00000006"
    Path("out").mkdir()
    assert export(str(checkpoint), "out") == 0
    assert equal_weights(Path("out"), checkpoint / "model")
    assert "| base model | model |" in Path("out/README.md").read_text()
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "llama"
    file = checkpoint / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert export(str(checkpoint), "other") == 2
    assert "model/model.safetensors has" in capsys.readouterr().err
    assert sorted(path.name for path in trained.root.glob("*other*")) == []


def test_contradictions_are_refused(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("runs/tiny", "model"), "model: exists and is not an empty folder"),
        (("runs/tiny", "train.jsonl"), "train.jsonl: exists and is not an empty folder"),
        (("runs/tiny", "out", "--merge"), "the run trained no adapter"),
        (("runs/tiny", "out", "--steps", "3"), "--steps: needs --from-seedlog"),
        (("runs", "out"), "neither a run directory nor a checkpoint"),
        (("runs", "out", "--from-seedlog", "model"), "is not a run directory"),
        (("runs/tiny", "train.jsonl/out"), "train.jsonl/out: could not be written"),
    ):
        assert export(*arguments) == 2
        assert message in capsys.readouterr().err
        assert not Path("out").exists()
