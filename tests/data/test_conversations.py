import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chats import CHATML, chat_tokenizer
from vamo_ft.config.data import ChatFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.chat import tokenize_conversations
from vamo_ft.data.conversations import Conversation, read_conversations
from vamo_ft.data.sources import Rows

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


def read(*rows: dict[str, Any], **keys: Any) -> list[Conversation]:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return list(read_conversations(Rows("c.jsonl", columns, rows), ChatFormat(type="chat", **keys)))


def test_openai_messages() -> None:
    [found] = read({"messages": [USER, ANSWER, USER, {**ANSWER, "reasoning_content": "so"}]})
    assert list(found.messages) == [USER, ANSWER, USER, {**ANSWER, "reasoning_content": "so"}]
    assert (found.place, list(found.learnt), found.tools) == ("c.jsonl: row 1", [1, 3], None)
    assert read({"messages": json.dumps([USER, ANSWER])})[0].messages == [USER, ANSWER]


def test_sharegpt_turns() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    [found] = read({"conversations": turns}, messages="conversations")
    assert list(found.messages) == [{"role": "system", "content": "s"}, USER, ANSWER]
    with pytest.raises(DataError, match=r"^c\.jsonl: row 1, message 1: 'from' is none of system, human"):
        read({"messages": [{"from": "robot", "value": "x"}]})


def test_which_turns_are_learnt() -> None:
    row = {"messages": [USER, ANSWER, USER, ANSWER]}
    assert list(read(row, train_on="last")[0].learnt) == [3]
    assert list(read({"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]})[0].learnt) == [3]
    assert list(read({"messages": [USER]})[0].learnt) == []
    assert list(read({"messages": [USER, ANSWER, USER, {**ANSWER, "weight": 0}]}, train_on="last")[0].learnt) == []
    assert "weight" not in read({"messages": [{**USER, "weight": 1}]})[0].messages[0]


def test_a_system_turn_of_the_configuration() -> None:
    own = {"role": "system", "content": "mine"}
    given, added = read({"messages": [own, USER, ANSWER]}, {"messages": [USER, ANSWER]}, system="be kind")
    assert (given.messages[0], list(given.learnt)) == (own, [2])
    assert (added.messages[0], list(added.learnt)) == ({"role": "system", "content": "be kind"}, [2])


def test_tools_and_their_calls_are_passed_through() -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "12", "tool_call_id": "a"},
    ]
    [found] = read({"messages": messages, "functions": json.dumps([tool])}, tools="functions")
    assert found.tools == [tool]
    function = {"name": "clock", "arguments": {"zone": "UTC"}}
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{**call, "function": function}]}
    assert found.messages[2] == messages[2]
    assert read({"messages": [USER], "tools": None}, tools="tools")[0].tools is None
    unread = {"type": "function", "function": {"name": "clock", "arguments": "not JSON"}}
    assert read({"messages": [{**messages[1], "tool_calls": [unread]}]})[0].messages[0]["tool_calls"] == [unread]


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}]})[0].messages[0]["content"] == "ab"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "row 1: column 'messages' holds no messages; remove the row"),
        (None, "row 1: column 'messages' holds no messages; remove the row"),
        ("hello", "row 1: column 'messages' is text that is not JSON; write a list"),
        (7, "row 1: column 'messages' holds a int; write a list"),
        (["x"], "row 1, message 1: is a str; write an object with role and content"),
        ([USER, {"content": "x"}], "row 1, message 2: has no role; write an object with role and content"),
        ([{"role": 3, "content": "x"}], "row 1, message 1: has no role; write an object with role and content"),
        ([{"role": "user"}], "row 1, message 1: has no content"),
        ([{"role": "user", "content": 3}], "row 1, message 1: its content is a int; write text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "row 1, message 1: a part of its content is of type image_url; only text is learnt from",
        ),
        ([{**ANSWER, "weight": 0.5}], "row 1, message 1: weight is 0.5; write 0 or 1"),
        ([{**ANSWER, "tool_calls": "x"}], "row 1, message 1: tool_calls is not a list of objects"),
    ],
)
def test_rows_that_are_no_conversations(messages: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read({"messages": messages})
    assert str(caught.value) == f"c.jsonl: {said}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "weight", "type", "text", "function", "x"]
            ),
            inner | st.sampled_from(["user", "assistant", "gpt", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(messages=JSON | st.lists(JSON, max_size=3), tools=JSON, train_on=st.sampled_from(["assistant", "last"]))
def test_any_row_is_tokenized_or_refused_in_one_line(messages: Any, tools: Any, train_on: str) -> None:
    refusal = "c.jsonl: "
    try:
        [found] = read({"messages": messages, "tools": tools}, tools="tools", train_on=train_on)
        assert all(found.messages[number]["role"] == "assistant" for number in found.learnt)
        data = tokenize_conversations([found], chat_tokenizer(CHATML), max_length=99, place="c.jsonl")
        assert len(data) == 1 and data.num_supervised(0) > 0
    except DataError as error:
        refusal = str(error)
    assert refusal.startswith("c.jsonl: ") and "\n" not in refusal


def test_columns_that_do_not_exist() -> None:
    with pytest.raises(DataError, match=r"no column 'messages' \(data\.format\.messages\); the columns are turns"):
        read({"turns": [USER]})
    with pytest.raises(DataError, match=r"no column 'tools' \(data\.format\.tools\)"):
        read({"messages": [USER]}, tools="tools")
