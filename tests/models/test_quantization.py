"""Quantised bases as far as a machine without CUDA can tell: what is asked of transformers, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.config.examples import VALID, problems_of
from tests.tiny import save_model_folder, tiny_llama
from vamo_ft.config.model import AdapterConfig, ModelConfig, QuantizationConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models import loading
from vamo_ft.models.four_bits import four_bit_bytes


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    base = save_model_folder(tmp_path / "base", tiny_llama())
    quantization = QuantizationConfig(bits=4, double_quant=False, compute_dtype="float32")
    return ModelConfig(path=str(base), dtype="bfloat16", quantization=quantization, adapter=AdapterConfig(type="lora"))


def test_the_arguments(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def plain(*, quantization_config: Any, device_map: Any, **arguments: Any) -> Any:
        asked.update(arguments, quantization=quantization_config, device_map=device_map)
        return from_pretrained(**arguments)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", plain)
    monkeypatch.setattr(loading, "BitsAndBytesConfig", dict)
    monkeypatch.setattr(loading, "_check_quantization", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    loaded = loading.load_model(config, offline=True, seed=1)
    assert asked["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    assert asked["device_map"] == {"": 0}
    assert asked["dtype"] == torch.bfloat16
    trained = {parameter.dtype for parameter in loaded.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}, "the adapter stays in float32"


def test_what_is_missing_is_named(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'vamo-ft\[bitsandbytes\]'"):
        loading.load_model(config, offline=True, seed=1)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(DataError, match=r"^model\.quantization: needs a CUDA device, and there is none; leave it out$"):
        loading.load_model(config, offline=True, seed=1)


def test_contradictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantized = "model.quantization={bits: 4}"
    adapter = "model.adapter={type: lora}"
    assert problems_of(VALID, quantized, adapter) == []
    assert "quantised weights are not trained; add model.adapter" in problems_of(VALID, quantized)[0]
    assert "a .gguf file is dequantised" in problems_of(VALID, quantized, adapter, "model.path=a.gguf")[0]
    assert "must be 4" in problems_of(VALID, adapter, "model.quantization={bits: 3}")[0]


def test_a_frozen_weight_takes_what_the_readme_says() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert "(QLoRA) a frozen weight takes 0.52 bytes" in text
    numel = 4096 * 4096
    assert four_bit_bytes(numel, double_quant=True) / numel == pytest.approx(0.52, abs=0.005)
    saved_bits = 8 * (four_bit_bytes(numel, double_quant=False) - four_bit_bytes(numel, double_quant=True)) / numel
    assert saved_bits == pytest.approx(0.373, abs=0.001)  # arXiv 2305.14314, section 3
    assert four_bit_bytes(65, double_quant=False) == 33 + 2 * 4
    assert four_bit_bytes(64 * 256 + 1, double_quant=True) == 32 * 256 + 1 + 257 + 2 * 4
