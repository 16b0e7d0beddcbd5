"""Models without values are, but for the values, those that are read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import (
    byte_tokenizer,
    save_model_folder,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
)
from vamo_ft.config.model import ModelConfig
from vamo_ft.models.adapters import trained_in_full
from vamo_ft.models.export import save_model
from vamo_ft.models.hollow import load_hollow
from vamo_ft.models.loading import load_model

LORA = {"type": "lora", "r": 2}
CLASSES: dict[str, Any] = {"task": "sequence_classification"}


def outline(module: nn.Module) -> list[tuple[Any, ...]]:
    """Names, shapes and types in their order, and what is trained."""
    parameters = [(name, each.shape, each.dtype, each.requires_grad) for name, each in module.named_parameters()]
    return [*parameters, *((name, each.shape, each.dtype) for name, each in module.named_buffers())]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model_folder(root / "llama", tiny_llama())
    save_model_folder(root / "tied", tiny_llama(tied=True))
    save_model_folder(root / "gpt2", tiny_gpt2())
    save_model_folder(root / "classifier", tiny_llama_classifier())
    tiny_bert_classifier().base_model.save_pretrained(root / "bert")  # neither pooler nor head
    byte_tokenizer().save_pretrained(root / "bert")
    return root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("tied", {"freeze": ["*layers.0*"]}),
        ("gpt2", {"adapter": LORA}),
        ("llama", {"adapter": {**LORA, "modules_to_save": ["lm_head", "norm"]}}),
        ("llama", CLASSES),
        ("classifier", {**CLASSES, "adapter": LORA}),
        ("bert", {**CLASSES, "adapter": {**LORA, "target_modules": ["query", "value"]}}),
    ],
)
def test_nothing_but_values_is_missing(name: str, changes: dict[str, Any], dtype: Any, models: Path) -> None:
    config = ModelConfig(path=str(models / name), dtype=dtype, **changes)
    num_labels = 2 if config.task == "sequence_classification" else None
    read = load_model(config, offline=True, seed=0, num_labels=num_labels)
    hollow = load_hollow(config, offline=True, num_labels=num_labels, modules_to_save=trained_in_full(read.model))
    assert outline(hollow.model) == outline(read.model)
    assert {tensor.device for tensor in hollow.model.state_dict().values()} == {torch.device("meta")}


def test_a_whole_saved_model_needs_its_base_no_more(models: Path, tmp_path: Path) -> None:
    read = load_model(ModelConfig(path=str(models / "llama")), offline=True, seed=0)
    save_model(read.model, read.tokenizer, tmp_path / "saved")
    hollow = load_hollow(
        ModelConfig(path=str(tmp_path / "gone")), offline=True, num_labels=None, weights=tmp_path / "saved"
    )
    assert outline(hollow.model) == outline(read.model)
