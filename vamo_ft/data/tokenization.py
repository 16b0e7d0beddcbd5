"""Turns text into token ids: prompt and completion apart, cut to a length, kept in flat arrays.

The beginning of a prompt is cut first and a completion never, since the completion is what is learnt; special tokens
that the tokenizer puts in front stay. A text for a classifier keeps its beginning instead.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING

from vamo_ft.core.errors import DataError
from vamo_ft.data.formatting import TextExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Example",
    "TokenizedData",
    "tokenize_for_classifier",
    "tokenize_for_language_model",
    "tokenize_options",
    "tokenize_prompt",
    "tokenize_question",
]

_CHUNK = 1000
"""Rows that are given to the tokenizer at once."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized sample; `index` is its place in the data set, `label` its class number."""

    index: int
    prompt_ids: Ids
    completion_ids: Ids
    label: int | None


@dataclass(frozen=True)
class TokenizedData:
    """All samples of a data set.

    Attributes:
        tokens: the ids of all prompts and completions in turn.
        ends: `ends[2 i]` and `ends[2 i + 1]` are where prompt and completion of sample i end in `tokens`.
        labels: class number of each sample, or None.
        num_truncated: samples that were cut to the maximum length.
    """

    tokens: "array[int]"
    ends: "array[int]"
    labels: tuple[int | None, ...]
    num_truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        start, middle, end = self._bounds(index)
        return Example(index, tuple(self.tokens[start:middle]), tuple(self.tokens[middle:end]), self.labels[index])

    def prompt_length(self, index: int) -> int:
        """Tokens of the prompt."""
        start, middle, _ = self._bounds(index)
        return middle - start

    def input_length(self, index: int) -> int:
        """Tokens that a model reads: the last one of a completion is only predicted."""
        start, middle, end = self._bounds(index)
        return middle - start + max(0, end - middle - 1)

    @property
    def largest_token(self) -> int:
        """The largest id that occurs; -1 where there is none."""
        return max(self.tokens, default=-1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token, boundary and label."""
        digest = sha256(f"{len(self.tokens)} {len(self.ends)} {self.labels}".encode())
        digest.update(self.tokens.tobytes())
        digest.update(self.ends.tobytes())
        return digest.hexdigest()

    def _bounds(self, index: int) -> tuple[int, int, int]:
        start = self.ends[2 * index - 1] if index > 0 else 0
        return start, self.ends[2 * index], self.ends[2 * index + 1]


class _Writer:
    def __init__(self) -> None:
        self._tokens = array("i")
        self._ends = array("q")
        self._labels: list[int | None] = []
        self._num_truncated = 0

    @property
    def num_samples(self) -> int:
        return len(self._labels)

    def append(self, prompt: Sequence[int], completion: Sequence[int], *, label: int | None, truncated: bool) -> None:
        for ids in (prompt, completion):
            self._tokens.extend(ids)
            self._ends.append(len(self._tokens))
        self._labels.append(label)
        self._num_truncated += truncated

    def finish(self) -> TokenizedData:
        return TokenizedData(self._tokens, self._ends, tuple(self._labels), self._num_truncated)


def tokenize_options(labels: Mapping[str, str], tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, ...]:
    """The tokens of each label text, without special tokens.

    Raises:
        DataError: a text has no tokens, or two have the same.
    """
    options = tuple(tuple(ids) for ids in _encode(list(labels.values()), tokenizer))
    for label, ids in zip(labels, options, strict=True):
        if not ids:
            raise DataError(f"data.format.labels.{label}: the text {labels[label]!r} has no tokens")
        first = next(other for other, ids_of_other in zip(labels, options, strict=True) if ids_of_other == ids)
        if first != label:
            raise DataError(f"data.format.labels: {first} and {label} have the same tokens and cannot be told apart")
    return options


def tokenize_for_language_model(
    examples: Iterable[TextExample],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    options: Sequence[Ids] | None,
    place: str,
) -> TokenizedData:
    """Prompts, and completions with the end-of-text token or, for a classification, one of `options`.

    Args:
        max_length: tokens of prompt and completion together. With options there is room for the longest one, so that
            a prompt is the same whichever option follows.
        options: tokens of each class; None tokenizes the completions.
        place: the data set's name, for messages.

    Raises:
        DataError: a completion leaves no room for a prompt, or the tokenizer lacks a special token that is needed.
    """
    if options is None and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, with which a completion has to end")
    prefix, _ = _special_tokens(tokenizer)
    reserved_for_options = max(len(option) for option in options) if options else 0
    writer = _Writer()
    for chunk in _chunks(examples):
        bodies = _encode([text.prompt for text in chunk], tokenizer)
        completions = _completions(chunk, tokenizer, options=options)
        for text, body, completion in zip(chunk, bodies, completions, strict=True):
            row = f"{place}: row {writer.num_samples + 1}"
            reserved = max(len(completion), reserved_for_options)
            room = max_length - reserved
            if room < 1:
                raise DataError(
                    f"{row}: a completion of {reserved} tokens leaves no room for the prompt within "
                    f"data.max_length {max_length}; raise it, or shorten the row"
                )
            prompt = (*prefix, *body) or _stand_in(tokenizer, place=row)
            truncated = len(prompt) > room
            if truncated:
                kept = max(0, room - len(prefix))
                prompt = (*prefix[:room], *body[len(body) - kept :])
            writer.append(prompt, completion, label=text.label, truncated=truncated)
    return writer.finish()


def _completions(
    chunk: Sequence[TextExample], tokenizer: "PreTrainedTokenizerBase", *, options: Sequence[Ids] | None
) -> list[Ids]:
    if options is None:
        texts = [text.completion for text in chunk]
        return [(*ids, tokenizer.eos_token_id) for ids in _encode(texts, tokenizer)]
    return [options[text.label] for text in chunk if text.label is not None]


def tokenize_for_classifier(
    examples: Iterable[TextExample], tokenizer: "PreTrainedTokenizerBase", *, max_length: int, place: str
) -> TokenizedData:
    """Prompts alone, with all special tokens; a longer one loses its end.

    Args:
        max_length: tokens of the text with its special tokens.
        place: the data set's name, for messages.

    Raises:
        DataError: a prompt has no tokens and the tokenizer has none to stand for it.
    """
    prefix, suffix = _special_tokens(tokenizer)
    room = max(0, max_length - len(prefix) - len(suffix))
    writer = _Writer()
    for chunk in _chunks(examples):
        for text, body in zip(chunk, _encode([text.prompt for text in chunk], tokenizer), strict=True):
            row = f"{place}: row {writer.num_samples + 1}"
            prompt = (*prefix, *body[:room], *suffix) or _stand_in(tokenizer, place=row)
            writer.append(prompt, (), label=text.label, truncated=len(body) > room)
    return writer.finish()


def _chunks(examples: Iterable[TextExample]) -> Iterator[list[TextExample]]:
    remaining = iter(examples)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool = False) -> list[list[int]]:
    encoding = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids]:
    """What the tokenizer puts before and after a text."""
    body, full = _encode(["a"], tokenizer)[0], _encode(["a"], tokenizer, special=True)[0]
    start = next(start for start in range(len(full) + 1) if full[start : start + len(body)] == body)
    return tuple(full[:start]), tuple(full[start + len(body) :])


def tokenize_prompt(text: str, tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """A prompt that a language model continues, as in training: with what the tokenizer puts before a text.

    Raises:
        DataError: it has no tokens, and the tokenizer has none to stand for it.
    """
    prefix, _ = _special_tokens(tokenizer)
    return (*prefix, *_encode([text], tokenizer)[0]) or _stand_in(tokenizer, place="the prompt")


def tokenize_question(text: str, tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """A user's turn in the tokenizer's chat template, up to where the assistant begins.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the turn.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template; --raw gives the prompt as it is")
    try:
        wrapped = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template may raise whatever it likes
        raise DataError(f"the tokenizer's chat template cannot be filled: {' '.join(str(error).split())}") from error
    assert isinstance(wrapped, str)
    return tuple(_encode([wrapped], tokenizer)[0])


def _stand_in(tokenizer: "PreTrainedTokenizerBase", *, place: str) -> Ids:
    """The one token of an empty prompt: a model cannot predict without any input."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (token,)
    raise DataError(f"{place}: the prompt has no tokens, and the tokenizer has no special token to stand for it")
