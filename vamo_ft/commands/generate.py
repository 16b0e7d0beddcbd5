"""`vamo-ft generate`: a quick look at what a model has learnt."""

import math
import sys
from collections.abc import Sequence

from rich.console import Console

from vamo_ft.assemble import build_answerer
from vamo_ft.commands.console import logging_to
from vamo_ft.commands.settings import Subject
from vamo_ft.config.data import ChatFormat
from vamo_ft.core.errors import UsageError
from vamo_ft.training.runtime import memory_errors_explained

__all__ = ["generate"]


def generate(
    subject: Subject,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool | None,
) -> None:
    """Prints an answer to each prompt as it comes; with several prompts, each after a line `> prompt`.

    Args:
        prompts: `-` stands for all of standard input.
        chat: wrap prompts in the chat template; None: as in training, and where the model comes from no run, if it has
            a template.

    Raises:
        UsageError: options contradict each other, the model generates nothing, or it has no room for the answer.
        DataError: the model is not what the configuration says, or has no chat template.
    """
    if math.isinf(temperature):
        raise UsageError("--temperature: must be a finite number, such as 0.7")
    if temperature == 0 and top_p != 1:
        raise UsageError("--top-p: nothing is drawn; add --temperature, such as 0.7")
    if top_p == 0:
        raise UsageError("--top-p: 0 leaves no token to draw; for the most probable one leave --temperature at 0")
    run = subject.run
    if run is not None and run.model.task == "sequence_classification":
        raise UsageError("the run trained a classifier, which generates no text; 'vamo-ft evaluate' scores it")
    settings = run.data.format if run is not None and isinstance(run.data.format, ChatFormat) else None
    if run is not None and chat is None:
        chat = settings is not None
    texts = [_standard_input() if prompt == "-" else prompt for prompt in prompts]
    with logging_to(Console(stderr=True)), memory_errors_explained("generating"):
        ask = build_answerer(
            subject.model,
            weights=subject.weights,
            offline=run is not None and run.run.offline,
            chat=chat,
            chat_template=None if run is None else run.data.chat_template,
            system=None if settings is None else settings.system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            write=lambda text: print(text, end="", flush=True),
        )
        for text in texts:
            if len(texts) > 1:
                print(f"> {text}")
            ask(text)
            print(flush=True)


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"-: standard input is not {error.encoding} text (byte {error.start + 1})") from error
