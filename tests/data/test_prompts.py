from typing import Any

import pytest

from tests.tiny import byte_tokenizer
from vamo_ft.core.errors import DataError
from vamo_ft.data.chat import tokenize_conversations
from vamo_ft.data.conversations import Conversation
from vamo_ft.data.formatting import TextExample
from vamo_ft.data.prompts import tokenize_prompt, tokenize_question
from vamo_ft.data.tokenization import tokenize_for_language_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("system", [None, "Be short."])
def test_a_question_is_what_training_put_before_the_answer(system: str | None) -> None:
    tokenizer = chat_tokenizer()
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    trained = tokenize_conversations(
        [Conversation("here", turns, None, [len(turns) - 1])], tokenizer, max_length=99, place="here"
    )[0]
    question = tokenize_question("1+1?", tokenizer, system=system)
    assert trained.token_ids[: len(question)] == question
    assert trained.supervised[0][0] == len(question), "what is learnt begins there"


@pytest.mark.parametrize("text", ["It was", ""])
def test_a_prompt_is_that_of_training(text: str) -> None:
    tokenizer = byte_tokenizer()
    trained = tokenize_for_language_model(
        [TextExample(text, " fine", None)], tokenizer, max_length=99, options=None, place="here"
    )[0]
    prompt = tokenize_prompt(text, tokenizer)
    assert trained.token_ids[: len(prompt)] == prompt
    assert trained.supervised[0][0] == len(prompt)


def test_templates_that_refuse() -> None:
    with pytest.raises(DataError, match="no chat template; --raw gives the prompt as it is"):
        tokenize_question("a", byte_tokenizer(), system=None)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    with pytest.raises(DataError, match="cannot be filled: no system turns here"):
        tokenize_question("a", chat_tokenizer(refusing), system="b")
