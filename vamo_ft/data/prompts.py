"""Prompts that a model is to continue, wrapped as in training."""

from typing import TYPE_CHECKING

from vamo_ft.core.errors import DataError
from vamo_ft.data.examples import Ids
from vamo_ft.data.tokenization import encode, special_tokens, stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize_prompt", "tokenize_question"]


def tokenize_prompt(text: str, tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """A text to continue, with what the tokenizer puts before one.

    Raises:
        DataError: it has no tokens, and the tokenizer has none to stand for it.
    """
    prefix, _ = special_tokens(tokenizer)
    return (*prefix, *encode([text], tokenizer)[0]) or stand_in(tokenizer, place="the prompt")


def tokenize_question(text: str, tokenizer: "PreTrainedTokenizerBase", *, system: str | None) -> Ids:
    """A user's turn in the tokenizer's chat template, up to where the assistant begins.

    Args:
        system: the turn before it; None: there is none.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the turn.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template; --raw gives the prompt as it is")
    turns = [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": text}]
    try:
        wrapped = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may raise whatever it likes
        raise DataError(f"the tokenizer's chat template cannot be filled: {' '.join(str(error).split())}") from error
    assert isinstance(wrapped, str)
    return tuple(encode([wrapped], tokenizer)[0])
