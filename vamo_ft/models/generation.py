"""Answers of a language model, token by token.

Shapes: B rows, P prompt tokens, N new tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from vamo_ft.models.compilation import uncompiled
from vamo_ft.models.export import quietly

__all__ = ["Decode", "answer_writer", "greedy_decoder", "text_decoder"]

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Rows of tokens -> their texts."""

_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(9), *range(11, 32), *range(127, 160))}
"""What a terminal would obey, shown as text; line ends and tabs are left."""


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


def text_decoder(tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = False) -> Decode:
    """A function of rows of tokens that gives their texts, with or without special tokens."""

    def decode(rows: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=not special_tokens)
        return texts

    return decode


def answer_writer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    end: int | None,
    write: Callable[[str], None],
) -> Callable[[Sequence[int]], None]:
    """A function of a prompt's tokens that passes the answer's text to `write` as it comes, special tokens left out.

    An answer ends with the tokenizer's end-of-text token, or one of those of the model's own generation settings, whose
    sampling and penalties are left aside. It depends on nothing but the prompt and the arguments here.

    Args:
        temperature: of the softmax that tokens are drawn from; 0: the most probable one each time.
        top_p: least mass of the most probable tokens to draw from (Holtzman et al., arXiv 1904.09751); 1: all.
        seed: of each answer anew.
        end: a further token that ends an answer, such as that of a turn; None: there is none.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        use_cache=True,
        eos_token_id=_end_tokens(model, tokenizer, end) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    if temperature > 0:
        settings.temperature, settings.top_p, settings.top_k = temperature, top_p, 0

    def answer(prompt: Sequence[int]) -> None:
        ids = torch.tensor([prompt], device=model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with quietly(), _without_own_settings(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=_streamer(tokenizer, write),
            )

    return answer


def _streamer(tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> TextStreamer:
    """Passes text on as soon as no later token can change it."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: write(text.translate(_CONTROL))
    return streamer


def _end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, end: int | None) -> list[int]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config.eos_token_id
    ends = [end, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in ends if token is not None})


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
