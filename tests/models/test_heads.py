"""Classifier heads: which of their tensors are trained, and the names of their classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    RobertaConfig,
    RobertaModel,
)

from tests.tiny import ENCODER_SIZES, VOCABULARY, initialised, save_model_folder, tiny_llama_classifier
from vamo_ft.config.model import ModelConfig
from vamo_ft.models.export import save_model
from vamo_ft.models.loading import LoadedModel, load_model
from vamo_ft.models.merging import merge_adapter

BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def load(path: Path, *, class_names: Sequence[str] = (), **keys: Any) -> LoadedModel:
    config = ModelConfig(path=str(path), task="sequence_classification", **keys)
    return load_model(config, offline=True, seed=1, num_labels=2, class_names=class_names)


def test_every_tensor_of_a_new_head_of_several_layers_is_used(tmp_path: Path) -> None:
    encoder = initialised(RobertaModel, RobertaConfig(**ENCODER_SIZES), add_pooling_layer=False)
    base = save_model_folder(tmp_path / "base", encoder)
    model = load(base, adapter={"type": "lora", "r": 2}).model
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert {name for name in trained if "lora" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{layer}.{kind}"
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }


def test_names_of_classes_are_saved_and_with_them_their_number(tmp_path: Path) -> None:
    encoder = initialised(BartModel, BartConfig(**BART))
    base = save_model_folder(tmp_path / "base", encoder)
    loaded = load(base, class_names=["bad", "good"])
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")  # BART has 3 labels by default
    assert plain.config.id2label == {0: "bad", 1: "good"}
    assert plain.config.label2id == {"bad": 0, "good": 1}


def test_names_that_the_model_has_stay(tmp_path: Path) -> None:
    model = tiny_llama_classifier()
    model.config.id2label = {0: "no", 1: "yes"}
    save_model_folder(tmp_path, model)
    loaded = load(tmp_path, class_names=["bad", "good"])
    assert loaded.model.config.id2label == {0: "no", 1: "yes"}


def test_an_adapter_of_an_encoder_decoder_is_merged(tmp_path: Path) -> None:
    encoder = initialised(BartModel, BartConfig(**BART))
    base = save_model_folder(tmp_path / "base", encoder)
    adapted = load(base, adapter={"type": "lora", "r": 2}).model
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    ids = torch.tensor([[5, 6, 7, 2]])
    expected = adapted.eval()(input_ids=ids).logits
    merged, _ = merge_adapter(adapted)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
