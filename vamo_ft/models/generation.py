"""Answers of a language model, token by token.

Shapes: B rows, P prompt tokens, N new tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vamo_ft.models.compilation import uncompiled
from vamo_ft.models.export import quietly

__all__ = ["greedy_decoder", "text_decoder"]


def greedy_decoder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    end_of_turn: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of prompts and their mask, both (B, P) and padded on the left, that gives (B, N) new tokens.

    Each is the most probable one, N is at most `max_new_tokens`, and after its end-of-text token, or the one that ends
    a turn of a conversation, a row is padding. The model's own generation settings (sampling, penalties, other end
    tokens) are left aside.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted({token for token in (tokenizer.eos_token_id, end_of_turn) if token is not None}) or None,
        pad_token_id=tokenizer.pad_token_id,
    )

    def generate(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        with quietly(), _without_own_settings(model), uncompiled(model):
            rows: Tensor = model.generate(input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=settings)
        return rows[:, prompt_ids.shape[1] :]

    return generate


def text_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """A function of rows of tokens that gives their texts, without special tokens."""

    def decode(rows: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    return decode


@contextmanager
def _without_own_settings(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """What a call leaves open is otherwise taken from the model's generation_config."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
