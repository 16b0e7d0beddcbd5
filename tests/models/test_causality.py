from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertGenerationConfig,
    BertLMHeadModel,
    CpmAntConfig,
    Gemma3TextConfig,
    T5Config,
    ViTConfig,
    XLNetConfig,
)

from tests.tiny import ENCODER_SIZES, save_model_folder
from vamo_ft.config.model import ModelConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models.causality import check_causal
from vamo_ft.models.loading import load_model, load_outline


def test_an_encoder_is_refused_before_it_learns_to_copy(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "bert", BertForMaskedLM(BertConfig(**ENCODER_SIZES)))
    config = ModelConfig(path=str(folder))
    message = f"model.path: {folder}: bert is an encoder here, whose tokens see the ones to be predicted"
    with pytest.raises(DataError, match=message):
        load_model(config, offline=True, seed=0)
    with pytest.raises(DataError, match=message):
        load_outline(config, offline=True)


def test_an_encoder_made_a_decoder_is_not(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "bert", BertLMHeadModel(BertConfig(**ENCODER_SIZES, is_decoder=True)))
    model = load_model(ModelConfig(path=str(folder)), offline=True, seed=0).model.eval()
    first, second = (model(input_ids=torch.tensor([row])).logits[0, 0] for row in ([5, 6], [5, 7]))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "there: t5 is not a causal language model; write a decoder model"),
        (BartConfig(), "there: bart is an encoder with a decoder; write a decoder alone"),
        (ViTConfig(), "there: vit is not a causal language model; write a decoder model"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "there: gemma3_text is an encoder here"),
        (BertGenerationConfig(), "there: bert-generation is an encoder here"),
        (CpmAntConfig(), "there: cpmant is an encoder here"),
        (XLNetConfig(), "there: xlnet is an encoder here"),
    ],
)
def test_other_kinds(config: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_causal(config, path="there")


@pytest.mark.parametrize("config", [Gemma3TextConfig(), BertGenerationConfig(is_decoder=True)])
def test_a_causal_model_passes(config: Any) -> None:
    check_causal(config, path="there")
