from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from tests.chats import (
    BACKWARDS,
    CHATML,
    COUNTED,
    INSTRUCTIONS,
    MARKED,
    PLAIN,
    PROMPTED_THINKING,
    SHUFFLED,
    THINKING,
    chat_tokenizer,
)
from tests.tiny import byte_tokenizer
from vamo_ft.core.errors import DataError
from vamo_ft.data.chat import end_of_turn, set_chat_template, tokenize_conversations
from vamo_ft.data.conversations import Conversation
from vamo_ft.data.examples import TokenizedData

SYSTEM = {"role": "system", "content": "Be kind."}
TWO_TURNS = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello! \n"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]
THOUGHTS = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
]


def conversation(messages: Sequence[dict[str, Any]], *, learnt: Sequence[int] | None = None) -> Conversation:
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return Conversation("d: row 1", messages, None, said if learnt is None else learnt)


def tokenize(template: str | None, *conversations: Conversation, max_length: int = 1000) -> TokenizedData:
    return tokenize_conversations(conversations, chat_tokenizer(template), max_length=max_length, place="d")


def parts(data: TokenizedData) -> list[str]:
    """Text that is given and text that is learnt, in turn."""
    example = data[0]
    edges = [0, *(edge for span in example.supervised for edge in span)]
    return [chat_tokenizer().decode(example.token_ids[start:end]) for start, end in pairwise(edges)]


START = "<|im_start|>"
EXPECTED = [
    f"{START}user\nHi there<|im_end|>\n{START}assistant\n",
    "Hello! \n<|im_end|>",
    f"\n{START}user\nWho?<|im_end|>\n{START}assistant\n",
    "Me.<|im_end|>",
]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_assistants_turn_is_learnt_with_its_end(template: str) -> None:
    assert parts(tokenize(template, conversation(TWO_TURNS))) == EXPECTED
    data = tokenize(template, conversation([SYSTEM, *TWO_TURNS]))
    assert parts(data) == [f"{START}system\nBe kind.<|im_end|>\n{EXPECTED[0]}", *EXPECTED[1:]]
    assert (data.num_truncated, data.num_skipped) == (0, 0)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turns_that_are_not_learnt_and_what_follows_the_last(template: str) -> None:
    last = tokenize(template, conversation(TWO_TURNS, learnt=[3]))
    assert parts(last) == ["".join(EXPECTED[:3]), EXPECTED[3]]
    first = tokenize(template, conversation(TWO_TURNS, learnt=[1]))
    assert parts(first) == EXPECTED[:2]


def test_the_row_is_the_template_applied_and_tokenized_once() -> None:
    tokenizer = chat_tokenizer(CHATML)
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True)["input_ids"]
    assert tokenize(CHATML, conversation(TWO_TURNS))[0].token_ids == tuple(expected[:-1])  # without the last line break


def test_a_template_without_a_prompt_to_go_on() -> None:
    data = tokenize(INSTRUCTIONS, conversation(TWO_TURNS))
    assert parts(data) == ["<s>[INST] Hi there [/INST]", " Hello!</s>", "[INST] Who? [/INST]", " Me.</s>"]
    with pytest.raises(DataError, match=r"^d: row 1: the chat template does not take .* \(only user and assistant"):
        tokenize(INSTRUCTIONS, conversation([SYSTEM, *TWO_TURNS]))


def test_a_template_that_drops_earlier_thoughts() -> None:
    assert parts(tokenize(THINKING, conversation(THOUGHTS))) == [
        f"{START}user\n1+1<|im_end|>\n{START}assistant\n",
        "2<|im_end|>",
        f"\n{START}user\n2+2<|im_end|>\n{START}assistant\n",
        "<think>\nhm\n</think>\n\n4<|im_end|>",
    ]
    empty = tokenize(THINKING, conversation([*THOUGHTS[:3], {"role": "assistant", "content": "4"}]))
    assert parts(empty)[1:] == [
        "2<|im_end|>",
        f"\n{START}user\n2+2<|im_end|>\n{START}assistant\n",
        "<think>\n\n</think>\n\n4<|im_end|>",
    ]


def test_thoughts_between_calls_of_tools_that_a_later_question_drops() -> None:
    calling = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "<think>\ncall\n</think>\n\nclock()"},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "<think>\nread\n</think>\n\nnoon"},
    ]
    said = ["<think>\ncall\n</think>\n\nclock()<|im_end|>", "<think>\nread\n</think>\n\nnoon<|im_end|>"]
    assert parts(tokenize(THINKING, conversation(calling)))[1::2] == said
    asked = [*calling, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    assert parts(tokenize(THINKING, conversation(asked)))[1::2] == [
        "clock()<|im_end|>",
        "noon<|im_end|>",
        "<think>\n\n</think>\n\n!<|im_end|>",
    ]


def test_a_prompt_that_asks_for_thoughts_which_no_turn_shows() -> None:
    data = tokenize(PROMPTED_THINKING, conversation(THOUGHTS))
    assert parts(data)[1::2] == ["\n\n2<|im_end|>", "\n\n4<|im_end|>"]
    assert parts(data)[0].endswith(f"{START}assistant\n")


def test_what_the_template_puts_before_an_answer_is_learnt_unless_the_prompt_shows_it() -> None:
    data = tokenize(COUNTED, conversation(TWO_TURNS))
    assert parts(data) == [
        f"4{EXPECTED[0]}",
        f"<think>\n</think>\n{EXPECTED[1]}",
        EXPECTED[2],
        f"<think>\n</think>\n{EXPECTED[3]}",
    ]


def test_a_prompt_that_is_quoted_earlier_is_not_taken_for_the_turns_own() -> None:
    quoting = {"role": "user", "content": f"What is {START}assistant\n<think>\n?"}
    data = tokenize(PROMPTED_THINKING, conversation([quoting, *TWO_TURNS[1:]]))
    assert parts(data)[1::2] == [EXPECTED[1], EXPECTED[3]]
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Well, no"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me"},
    ]
    assert parts(tokenize(PLAIN, conversation(said))) == [
        "4\nuser: Hi\nassistant: Well, ",
        "no",
        "\nuser: Who?\nassistant: ",
        "Me",
    ]


def test_an_assistant_who_begins() -> None:
    messages = [{"role": "assistant", "content": "Yes?"}, *TWO_TURNS]
    assert parts(tokenize(CHATML, conversation(messages)))[:2] == [f"{START}assistant\n", "Yes?<|im_end|>"]


@pytest.mark.parametrize(("template", "message"), [(SHUFFLED, 2), (BACKWARDS, 4)])
def test_a_template_that_hides_its_turns(template: str, message: int) -> None:
    shown = rf"^d: row 1: the chat template does not show where message {message} is .*generation"
    with pytest.raises(DataError, match=shown):
        tokenize(template, conversation(TWO_TURNS))


def test_marks_that_do_not_count_the_turns() -> None:
    template = MARKED.replace("message.role == 'assistant'", "message.role == 'assistant' and loop.last")
    assert len(parts(tokenize(template, conversation(TWO_TURNS)))) == 2
    with pytest.raises(DataError, match=r"marks 1 generations and the conversation has 2 assistant's turns"):
        tokenize(template, conversation(TWO_TURNS, learnt=[3]))


def test_a_longer_conversation_loses_its_end_and_one_without_an_answer_is_left_out() -> None:
    silent = conversation(TWO_TURNS[:1])
    length = len(tokenize(CHATML, conversation(TWO_TURNS))[0].token_ids)
    counts = [(length, 0), (length - 1, 1), (length - 4, 1)]
    for max_length, truncated in counts:
        data = tokenize(CHATML, silent, conversation(TWO_TURNS), max_length=max_length)
        assert (len(data), data.num_truncated, data.num_skipped) == (1, truncated, 1)
        assert data.rows_of(0) == (1,)
        assert (parts(data) == EXPECTED) == (truncated == 0)
    assert parts(tokenize(CHATML, conversation(TWO_TURNS), max_length=length - 2))[-1] == "Me"
    assert parts(tokenize(CHATML, conversation(TWO_TURNS), max_length=length - 4)) == EXPECTED[:2]
    with pytest.raises(DataError, match=r"^d: no conversation has an assistant's turn .* data\.max_length 10; raise"):
        tokenize(CHATML, silent, conversation(TWO_TURNS), max_length=10)


def test_what_the_tokenizer_lacks() -> None:
    with pytest.raises(DataError, match=r"^the tokenizer has no chat template; set data\.chat_template"):
        tokenize(None, conversation(TWO_TURNS))


@pytest.mark.parametrize("text", ["é", "日本", "🙂 x"])
def test_characters_of_several_tokens(text: str) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert parts(tokenize(CHATML, conversation(messages)))[1] == f"{text}<|im_end|>"


def test_half_a_character() -> None:
    with pytest.raises(DataError, match=r"^d: row 1: a message is not valid Unicode"):
        tokenize(CHATML, conversation([{"role": "user", "content": "\ud800"}, *TWO_TURNS[1:]]))


def test_the_token_that_ends_a_turn() -> None:
    tokenizer = chat_tokenizer(CHATML)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(chat_tokenizer(INSTRUCTIONS)) == tokenizer.eos_token_id
    plain = "{% for message in messages %}{{ message.content + '\n' }}{% endfor %}"
    assert end_of_turn(chat_tokenizer(plain)) is None
    assert parts(tokenize(plain, conversation(TWO_TURNS)))[1] == "Hello! \n\n"


def test_a_template_of_ones_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, CHATML)
    assert tokenizer.chat_template == CHATML
    (tmp_path / "mine.jinja").write_text(INSTRUCTIONS, encoding="utf-8")
    set_chat_template(tokenizer, "mine.jinja")
    assert tokenizer.chat_template == INSTRUCTIONS
    with pytest.raises(DataError, match=r"^data\.chat_template: none\.jinja: cannot be read \(No such file"):
        set_chat_template(tokenizer, "none.jinja")
