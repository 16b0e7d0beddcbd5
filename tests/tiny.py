"""Models, a tokenizer and data small enough to build in a test."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vamo_ft.data.examples import Example

SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and pad, bos and eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


VOCABULARY = len(SPECIAL) + 256
ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
"""Of a BERT or RoBERTa."""


def tiny_llama(*, seed: int = 0, tied: bool = False, dropout: float = 0.0, hidden: int = 32) -> PreTrainedModel:
    """Two decoder layers, rotary positions."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return initialised(LlamaForCausalLM, config, seed)


def tiny_gpt2(*, seed: int = 0, dropout: float = 0.0, hidden: int = 32) -> PreTrainedModel:
    """Two layers, learnt absolute positions, tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return initialised(GPT2LMHeadModel, config, seed=seed)


def tiny_llama_classifier(*, num_labels: int = 2) -> PreTrainedModel:
    config = tiny_llama().config
    config.num_labels = num_labels
    return initialised(LlamaForSequenceClassification, config)


def tiny_bert_classifier(*, num_labels: int = 2, hidden: int = 32) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=num_labels,
        pad_token_id=0,
    )
    return initialised(BertForSequenceClassification, config)


def initialised(kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0, **keys: Any) -> PreTrainedModel:
    """A model with random values of its own, in evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config, **keys).eval()


def pair(index: int, prompt: Sequence[int], completion: Sequence[int], label: int | None = None) -> Example:
    """A prompt and the completion that is learnt; without a completion, a classifier's text."""
    row = (*prompt, *completion)
    return Example(index, row, ((len(prompt), len(row)),) if completion else (), label)


def save_model_folder(directory: Path, model: PreTrainedModel) -> Path:
    """A local Hugging Face folder with model and tokenizer."""
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_in_four_bits(
    directory: Path,
    base: Path,
    *,
    kind: str = "nf4",
    double: bool = True,
    skipped: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
) -> Path:
    """The model of a folder as transformers and bitsandbytes store it in 4 bits.

    Args:
        skipped: `llm_int8_skip_modules`.
        dtype: of what is not quantised.
        storage: type of the elements that the bits are packed into.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=None if skipped is None else list(skipped),
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
    )
    return save_model_folder(directory, model)


def without_special_tokens(folder: Path) -> None:
    """Puts a tokenizer that has none into a model folder."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentiment_rows(count: int) -> list[dict[str, Any]]:
    """Rows of unequal length with a learnable label."""
    words = [("bad", 0), ("good", 1)]
    return [
        {"sentence": "very " * (index % 5) + words[index % 2][0], "label": words[index % 2][1]}
        for index in range(count)
    ]
