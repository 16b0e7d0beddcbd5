"""Turns prompts and completions into token ids, apart from each other, and cuts them to a length.

The beginning of a prompt is cut first and a completion never, since the completion is what is learnt; special tokens
that the tokenizer puts in front stay. A text for a classifier keeps its beginning instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from vamo_ft.core.errors import DataError
from vamo_ft.data.examples import Ids, TokenizedData, TokenWriter
from vamo_ft.data.formatting import TextExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "encode",
    "in_chunks",
    "special_tokens",
    "stand_in",
    "tokenize_for_classifier",
    "tokenize_for_language_model",
    "tokenize_options",
]

T = TypeVar("T")

_CHUNK, _CHUNK_CHARACTERS = 1000, 1_000_000
"""Rows that are given to the tokenizer at once, unless they are long: a stop has to wait for it."""


def tokenize_options(
    labels: Mapping[str, str], tokenizer: "PreTrainedTokenizerBase", *, key: str = "data.format"
) -> tuple[Ids, ...]:
    """The tokens of each label text, without special tokens.

    Args:
        key: of the format in the configuration, for messages.

    Raises:
        DataError: a text has no tokens, or two have the same.
    """
    options = tuple(tuple(ids) for ids in encode(list(labels.values()), tokenizer))
    for label, ids in zip(labels, options, strict=True):
        if not ids:
            raise DataError(f"{key}.labels.{label}: the text {labels[label]!r} has no tokens")
        first = next(other for other, ids_of_other in zip(labels, options, strict=True) if ids_of_other == ids)
        if first != label:
            raise DataError(f"{key}.labels: {first} and {label} have the same tokens and cannot be told apart")
    return options


def tokenize_for_language_model(
    examples: Iterable[TextExample],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    options: Sequence[Ids] | None,
    place: str,
) -> TokenizedData:
    """Prompts, and completions with the end-of-text token or, for a classification, one of `options` or of its own.

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
    prefix, _ = special_tokens(tokenizer)
    reserved_for_options = max(len(option) for option in options) if options else 0
    writer = TokenWriter()
    for chunk in in_chunks(examples, size=_num_characters):
        bodies = encode([text.prompt for text in chunk], tokenizer)
        completions = _completions(chunk, tokenizer, options=options)
        for text, body, completion in zip(chunk, bodies, completions, strict=True):
            row = f"{place}: row {writer.next_row + 1}"
            own = tuple(tuple(ids) for ids in encode(list(text.options), tokenizer)) if text.options else ()
            if own and text.label is not None:
                completion = own[text.label]
            reserved = max(len(completion), reserved_for_options, *map(len, own))
            room = max_length - reserved
            if room < 1:
                raise DataError(
                    f"{row}: a completion of {reserved} tokens leaves no room for the prompt within "
                    f"data.max_length {max_length}; raise it, or shorten the row"
                )
            prompt = (*prefix, *body) or stand_in(tokenizer, place=row)
            truncated = len(prompt) > room
            if truncated:
                kept = max(0, room - len(prefix))
                prompt = (*prefix[:room], *body[len(body) - kept :])
            writer.append(
                (*prompt, *completion),
                ((len(prompt), len(prompt) + len(completion)),),
                label=text.label,
                options=own,
                references=text.references,
                right=text.right,
                truncated=truncated,
            )
    return writer.finish()


def _completions(
    chunk: Sequence[TextExample], tokenizer: "PreTrainedTokenizerBase", *, options: Sequence[Ids] | None
) -> list[Ids]:
    if options is None:
        texts = [text.completion for text in chunk]
        return [(*ids, tokenizer.eos_token_id) for ids in encode(texts, tokenizer)]
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
    prefix, suffix = special_tokens(tokenizer)
    room = max(0, max_length - len(prefix) - len(suffix))
    writer = TokenWriter()
    for chunk in in_chunks(examples, size=_num_characters):
        for text, body in zip(chunk, encode([text.prompt for text in chunk], tokenizer), strict=True):
            row = f"{place}: row {writer.next_row + 1}"
            prompt = (*prefix, *body[:room], *suffix) or stand_in(tokenizer, place=row)
            writer.append(prompt, (), label=text.label, truncated=len(body) > room)
    return writer.finish()


def in_chunks(examples: Iterable[T], *, size: Callable[[T], int]) -> Iterator[list[T]]:
    """What the tokenizer is given at once, in turn; `size` tells the characters of an example."""
    chunk: list[T] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        characters += size(example)
        if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _num_characters(example: TextExample) -> int:
    return len(example.prompt) + len(example.completion)


def encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool = False) -> list[list[int]]:
    """The tokens of each text; `special` adds what the tokenizer puts around a text."""
    encoding = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids]:
    """What the tokenizer puts before and after a text."""
    body, full = encode(["a"], tokenizer)[0], encode(["a"], tokenizer, special=True)[0]
    start = next(start for start in range(len(full) + 1) if full[start : start + len(body)] == body)
    return tuple(full[:start]), tuple(full[start + len(body) :])


def stand_in(tokenizer: "PreTrainedTokenizerBase", *, place: str) -> Ids:
    """The one token of an empty prompt: a model cannot predict without any input."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (token,)
    raise DataError(f"{place}: the prompt has no tokens, and the tokenizer has no special token to stand for it")
