"""A model that answers prompts."""

from collections.abc import Callable
from pathlib import Path

from vamo_ft.config.model import ModelConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.data.chat import end_of_turn, set_chat_template
from vamo_ft.data.prompts import tokenize_prompt, tokenize_question
from vamo_ft.models.generation import answer_writer
from vamo_ft.models.loading import load_model
from vamo_ft.training.runtime import build_runtime

__all__ = ["build_answerer"]


def build_answerer(
    config: ModelConfig,
    *,
    weights: Path | None,
    offline: bool,
    chat: bool | None,
    chat_template: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    write: Callable[[str], None],
) -> Callable[[str], None]:
    """Loads a model and returns a function of a prompt that passes the answer to `write`, piece by piece.

    Args:
        weights: as `load_model` takes them.
        chat: wrap prompts in the chat template; None: where there is one.
        chat_template: in place of the tokenizer's, as `data.chat_template`; None: the tokenizer's.
        system: turn before a prompt in the chat template; None: there is none.
        max_new_tokens: of one answer.
        temperature: 0 takes the most probable tokens.
        top_p: share of the probability to draw from.
        seed: of what is drawn, in each answer anew.

    Raises:
        DataError: the model is not what the configuration says, or has no chat template that can be filled.
        UsageError: from the function: the model has no positions for prompt and answer.
    """
    loaded = load_model(config, offline=offline, seed=seed, weights=weights)
    if loaded.four_bits is None:
        loaded.model.to(build_runtime(autocast=None).device)
    loaded.model.eval()
    tokenizer = loaded.tokenizer
    set_chat_template(tokenizer, chat_template)
    wrapped = tokenizer.chat_template is not None if chat is None else chat
    answer = answer_writer(
        loaded.model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        end=end_of_turn(tokenizer) if wrapped and tokenizer.chat_template is not None else None,
        write=write,
    )

    def ask(prompt: str) -> None:
        ids = tokenize_question(prompt, tokenizer, system=system) if wrapped else tokenize_prompt(prompt, tokenizer)
        limit = loaded.max_positions
        if limit is not None and len(ids) + max_new_tokens - 1 > limit:  # the last token is not read
            raise UsageError(
                f"--max-new-tokens: the prompt has {len(ids)} tokens, and the model positions for {limit}; shorten the "
                f"prompt, or ask for {max(0, limit - len(ids) + 1)} at most"
            )
        answer(ids)

    return ask
