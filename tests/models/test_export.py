import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_model_folder, tiny_gpt2, tiny_llama
from vamo_ft.config.model import ModelConfig
from vamo_ft.models.card import Card, write_model_card
from vamo_ft.models.export import quietly, save_model
from vamo_ft.models.loading import load_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_llama(tied=True), tiny_gpt2], ids=["llama", "tied", "gpt2"])
@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 2}], ids=["full", "lora"])
def test_folder_loads_with_nothing_of_ours(tmp_path: Path, build: Any, adapter: dict[str, Any] | None) -> None:
    base = save_model_folder(tmp_path / "base", build())
    loaded = load_model(ModelConfig(path=str(base), adapter=adapter), offline=True, seed=1)
    before = logits(loaded.model)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5).add_(0.01)
    out = tmp_path / "out"
    save_model(loaded.model, loaded.tokenizer, out)
    assert loaded.model.config.use_cache is False
    if adapter is None:
        plain = AutoModelForCausalLM.from_pretrained(out)
        assert plain.config.use_cache is True
    else:
        with quietly():
            plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    assert torch.equal(logits(plain), logits(loaded.model))
    assert not torch.equal(logits(plain), before)
    assert AutoTokenizer.from_pretrained(out)("a cat")["input_ids"] == loaded.tokenizer("a cat")["input_ids"]
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors"}


def test_folder_holds_no_path_but_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model_folder(Path("base"), tiny_llama())
    for adapter in (None, {"type": "lora", "r": 2}):
        config = ModelConfig(path="./base", adapter=adapter)
        loaded = load_model(config, offline=True, seed=1)
        save_model(loaded.model, loaded.tokenizer, tmp_path / "first")
        loaded = load_model(config, offline=True, seed=1, weights=tmp_path / "first")
        out = tmp_path / "out" / str(adapter is None)
        save_model(loaded.model, loaded.tokenizer, out)
        write_model_card(out, Card("t", base_model="./base"))
        for path in out.iterdir():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
        if adapter is not None:
            assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base"
        for path in (tmp_path / "first").iterdir():
            path.unlink()


def test_weights_are_as_readable_as_the_rest(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(path=str(save_model_folder(tmp_path / "base", tiny_llama()))), offline=True, seed=1)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
