"""Conversations through a chat template: which tokens the assistant says, and which it is told."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from vamo_ft.core.errors import DataError
from vamo_ft.data.conversations import Conversation, Message
from vamo_ft.data.examples import Spans, TokenizedData, TokenWriter
from vamo_ft.data.tokenization import in_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["end_of_turn", "set_chat_template", "tokenize_conversations"]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "\ue000\ue001\ue002"  # of the private-use area: in place of a turn, to see what a template puts around it


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
    """Uses `template`, a Jinja text or the path of a file with one, and saves it with the tokenizer; None: its own.

    Raises:
        DataError: it is neither.
    """
    if template is None:
        return
    if "{{" not in template and "{%" not in template:
        path = Path(template).expanduser()
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise DataError(f"data.chat_template: {path}: cannot be read ({reason}); name a Jinja file") from error
    tokenizer.chat_template = template


def tokenize_conversations(
    conversations: Iterable[Conversation], tokenizer: "PreTrainedTokenizerBase", *, max_length: int, place: str
) -> TokenizedData:
    """Conversations as the template renders them; turns that are learnt are supervised, to their end-of-turn token.

    Each is rendered once as a whole, up to the last turn that is learnt, and tokenized once. Where its turns lie is
    told by the template's `{% generation %}` marks, or found in the text: see `_turn`. A longer conversation loses its
    end. One of which nothing that is learnt remains is left out.

    Args:
        max_length: tokens of a conversation.
        place: the data set's name, for messages.

    Raises:
        DataError: there is no template, or it refuses a conversation or hides where a turn is; no conversation is left.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template; set data.chat_template to a Jinja file, or take an instruct model"
        )
    if not tokenizer.is_fast:
        raise DataError("the tokenizer cannot tell where its tokens lie in a text, which format.type: chat needs")
    writer = TokenWriter()
    for chunk in in_chunks(conversations, size=_num_characters):
        for ids, spans in _encoded(chunk, tokenizer):
            kept = [(start, min(end, max_length)) for start, end in spans if start < max_length]
            if not kept:
                writer.skip()
                continue
            writer.append(ids[: kept[-1][1]], tuple(kept), truncated=spans[-1][1] > max_length)
    if writer.num_samples == 0:
        raise DataError(
            f"{place}: no conversation has an assistant's turn to learn within data.max_length {max_length}; raise it, "
            "or see whether format.messages is the right column"
        )
    return writer.finish()


def _num_characters(conversation: Conversation) -> int:
    return sum(len(str(message.get("content", ""))) for message in conversation.messages)


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token with which the assistant's turns end; None: there is none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [(ids, spans)] = _encoded([Conversation("the chat template", messages, None, [1])], tokenizer)
    last = ids[spans[-1][1] - 1] if spans else None
    return last if last in tokenizer.added_tokens_decoder else None


def _encoded(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], Spans]]:
    """Tokens and supervised runs of each, both empty where nothing is learnt."""
    encoded: list[tuple[list[int], Spans]] = [([], ())] * len(conversations)
    texts: dict[int, tuple[str, list[tuple[int, int]]]] = {}
    controls = _Controls.of(tokenizer)
    for number, conversation in enumerate(conversations):
        if not conversation.learnt:
            continue
        with _refusals_told(conversation.place):
            template = tokenizer.get_chat_template(None, conversation.tools)
        if _MARKS.search(template):
            encoded[number] = _marked(conversation, tokenizer)
        else:
            texts[number] = _Rendering(conversation, tokenizer, controls).turns()
    if texts:
        encoding = tokenizer(
            [text for text, _ in texts.values()],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
        for place, (number, (_, turns)) in enumerate(texts.items()):
            starts = [start for start, _ in encoding["offset_mapping"][place]]
            # A token that reaches into a turn from before it is given; it cannot be the first one that is said.
            runs = [(max(1, bisect_left(starts, start)), bisect_left(starts, end)) for start, end in turns]
            encoded[number] = (encoding["input_ids"][place], _joined(runs))
    return encoded


def _marked(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], Spans]:
    """By the template's own `{% generation %}` marks."""
    messages = conversation.messages[: conversation.learnt[-1] + 1]
    with _refusals_told(conversation.place):
        encoding = tokenizer.apply_chat_template(
            list(messages), tools=conversation.tools, return_dict=True, return_assistant_tokens_mask=True
        )
    runs: list[tuple[int, int]] = []
    for said, places in groupby(range(len(encoding["input_ids"])), key=encoding["assistant_masks"].__getitem__):
        where = list(places)
        if said:
            runs.append((where[0], where[-1] + 1))
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(runs) == len(turns):
        runs = [run for run, number in zip(runs, turns, strict=True) if number in conversation.learnt]
    elif len(turns) > len(conversation.learnt):
        raise DataError(
            f"{conversation.place}: the chat template marks {len(runs)} generations and the conversation has "
            f"{len(turns)} assistant's turns, so that those to learn cannot be told from the others"
        )
    return encoding["input_ids"], _joined([(max(1, start), end) for start, end in runs])


def _joined(runs: Iterable[tuple[int, int]]) -> Spans:
    """Without empty runs, and with runs that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, end in runs:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif start < end:
            joined.append((start, end))
    return tuple(joined)


@contextmanager
def _refusals_told(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program, and raises what it likes
        words = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{place}: the chat template does not take this conversation ({words})") from error


def _num_alike(first: str, second: str) -> int:
    """Characters at the beginning that two texts share."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@dataclass(frozen=True, slots=True)
class _Controls:
    """Tokens that are no ordinary text: all that were added to the vocabulary, and those of them that are special."""

    added: tuple[str, ...]
    special: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "_Controls":
        tokens, named = tokenizer.added_tokens_decoder.values(), tokenizer.all_special_tokens
        return cls(
            (*(token.content for token in tokens), *named),
            (*(token.content for token in tokens if token.special), *named),
        )


class _Rendering:
    """One conversation as text, by a template without marks."""

    def __init__(self, conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", controls: _Controls) -> None:
        self._conversation = conversation
        self._tokenizer = tokenizer
        self._controls = controls
        self._messages = conversation.messages[: conversation.learnt[-1] + 1]
        self._whole = self._render(self._messages)

    def turns(self) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and where in it the turns lie that are learnt."""
        found: list[tuple[int, int]] = []
        for number in self._conversation.learnt:
            found.append(self._turn(number, after=found[-1][1] if found else 0))
        return self._whole, found

    def _turn(self, number: int, *, after: int) -> tuple[int, int]:
        """Start and end of a turn.

        It starts where the conversation before it, with the prompt to go on, ends; and ends where the conversation up
        to it does. Both have to be how the whole one begins. A template that writes earlier turns otherwise once others
        follow, as those do that drop earlier thoughts, is asked for the conversation with something else in place of
        the turn: what differs is what was said, and around it are the header and the end-of-turn token.
        """
        earlier = self._messages[:number]
        prompt = self._render(earlier, add_generation_prompt=True) if earlier else None
        through = self._closed(self._render(self._messages[: number + 1]))
        if prompt is not None and self._whole.startswith(prompt) and self._whole.startswith(through):
            if len(through) > len(prompt):
                return len(prompt), len(through)
        elif found := self._differing(number, prompt=prompt, through=through, after=after):
            return found
        raise DataError(
            f"{self._conversation.place}: the chat template does not show where message {number + 1} is in the whole "
            "conversation; put {% generation %} and {% endgeneration %} around what the assistant says in a "
            "data.chat_template, or set format.train_on: last"
        )

    def _differing(self, number: int, *, prompt: str | None, through: str, after: int) -> tuple[int, int] | None:
        stand_in = {"role": "assistant", "content": _STAND_IN}
        other = self._render([*self._messages[:number], stand_in, *self._messages[number + 1 :]])
        if _STAND_IN not in other:
            return None
        whole = self._whole
        start = _num_alike(whole, other)
        end = len(whole) - _num_alike(whole[start:][::-1], other[start:][::-1])
        following = whole[end:].lstrip()
        closing = max((token for token in self._controls.added if through.endswith(token)), key=len, default="")
        if closing and following.startswith(closing):
            end = len(whole) - len(following) + len(closing)
        if prompt is not None:
            bare = self._render(self._messages[:number])
            header = prompt[len(bare) :] if prompt.startswith(bare) else ""
            # It may reach into the turn, whose first words are those that the prompt gives, or end before it, where the
            # template puts something in front, such as empty thoughts. Then no other header may lie between.
            place = whole.rfind(header, after, min(end, start + len(header))) if header else -1
            said = place + len(header)
            if place >= 0 and not any(token in whole[said:start] for token in self._controls.special):
                start = said
        return (start, end) if after <= start < end else None

    def _closed(self, text: str) -> str:
        """Without the white space after the end-of-turn token, which is the template's."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._controls.added) else text

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        with _refusals_told(self._conversation.place):
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=self._conversation.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
            raise DataError(f"{self._conversation.place}: a message is not valid Unicode") from error
        return text
