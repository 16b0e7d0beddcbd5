"""Turns rows into conversations, as chat templates take them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vamo_ft.config.data import ChatFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.rows import Row, Rows
from vamo_ft.data.values import check_columns, numbered

__all__ = ["Conversation", "Message", "read_conversations"]

Message = Mapping[str, Any]
"""At least `role` and `content`; what else a row has, such as `tool_calls`, is the template's affair."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row.

    Attributes:
        place: of the row, for messages.
        messages: the turns in order.
        tools: descriptions of the tools that the assistant may call, or None.
        learnt: the numbers of the assistant's turns that are learnt, from 0, ascending; may be empty.
    """

    place: str
    messages: Sequence[Message]
    tools: Sequence[Any] | None
    learnt: Sequence[int]


def read_conversations(rows: Rows, config: ChatFormat, *, key: str = "data.format") -> Iterator[Conversation]:
    """The conversations, one after another; columns are checked before the first one is read.

    Turns are OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`). Content is text, or a list of parts that are
    text. An assistant's turn with OpenAI's `weight: 0` is not learnt. Values that are null are left out, and arguments
    of a tool call written as JSON text become the object that templates expect.

    Args:
        key: of `config` in the configuration, for messages.

    Raises:
        DataError: a column does not exist; from the iterator: a row is not a conversation.
    """
    check_columns(rows, [config.messages], key=f"{key}.messages")
    if config.tools is not None:
        check_columns(rows, [config.tools], key=f"{key}.tools")
    return (_conversation(row, config, place=place) for place, row in numbered(rows))


def _conversation(row: Row, config: ChatFormat, *, place: str) -> Conversation:
    values = _listed(row, config.messages, place=place)
    if not values:
        raise DataError(f"{place}: column '{config.messages}' holds no messages; remove the row")
    weights = []
    messages = []
    for number, value in enumerate(values, start=1):
        message = _message(value, place=f"{place}, message {number}")
        weights.append(_weight(message, place=f"{place}, message {number}"))
        messages.append(message)
    learnt = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if config.train_on == "last":
        learnt = learnt[-1:]
    learnt = [number for number in learnt if weights[number]]
    if config.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": config.system}, *messages]
        learnt = [number + 1 for number in learnt]
    tools = None if config.tools is None else _listed(row, config.tools, place=place)
    return Conversation(place, messages, tools or None, learnt)


def _listed(row: Row, column: str, *, place: str) -> Sequence[Any] | None:
    """A list, also one written as JSON text, since not every kind of file has lists; None where there is none."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{place}: column '{column}' is text that is not JSON; write a list") from None
    if value is not None and not isinstance(value, list):
        raise DataError(f"{place}: column '{column}' holds a {type(value).__name__}; write a list")
    return value


def _message(value: Any, *, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: is a {type(value).__name__}; write an object with role and content")
    kept = {name: part for name, part in value.items() if part is not None}
    if "role" not in kept and "from" in kept:
        role = _SHAREGPT_ROLES.get(str(kept.pop("from")))
        if role is None:
            raise DataError(f"{place}: 'from' is none of {', '.join(_SHAREGPT_ROLES)}; write one of them")
        kept = {"role": role, "content": kept.pop("value", ""), **kept}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise DataError(f"{place}: has no role; write an object with role and content")
    if "content" not in kept and "tool_calls" not in kept:
        raise DataError(f"{place}: has no content")
    calls = {"tool_calls": _tool_calls(kept["tool_calls"], place=place)} if "tool_calls" in kept else {}
    return {**kept, "content": _content(kept.get("content", ""), place=place), **calls}


def _content(value: Any, *, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(part, place=place) for part in value)
    raise DataError(f"{place}: its content is a {type(value).__name__}; write text")


def _part(part: Any, *, place: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"{place}: a part of its content is of type {kind}; only text is learnt from")


def _tool_calls(value: Any, *, place: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise DataError(f"{place}: tool_calls is not a list of objects")
    return [_tool_call(call) for call in value]


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return dict(call)
    if not isinstance(arguments, dict):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _weight(message: dict[str, Any], *, place: str) -> bool:
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{place}: weight is {weight!r}; write 0 or 1")
    return bool(weight)
