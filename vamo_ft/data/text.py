"""Plain documents: from rows to tokens of which all but the first are learnt."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vamo_ft.core.errors import DataError
from vamo_ft.data.examples import TokenizedData, TokenWriter
from vamo_ft.data.tokenization import encode, in_chunks, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize_documents"]


def tokenize_documents(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", *, max_length: int, split: bool, place: str
) -> TokenizedData:
    """Documents between what the tokenizer puts in front of a text and the end-of-text token.

    Empty ones are left out. Pieces of a document share the token at which it is cut, predicted in the first piece and
    read in the next, so that every token is learnt once.

    Args:
        max_length: tokens of a sample.
        split: cut a longer document into several samples; else it loses its end.
        place: the data set's name, for messages.

    Raises:
        DataError: every document is empty, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, with which a document has to end")
    prefix, _ = special_tokens(tokenizer)
    writer = TokenWriter()
    for chunk in in_chunks(documents):
        for text, body in zip(chunk, encode(chunk, tokenizer), strict=True):
            tokens = (*prefix, *body, tokenizer.eos_token_id)
            if not text.strip() or len(tokens) < 2:
                writer.skip()
                continue
            row = (writer.next_row,)
            for start in range(0, len(tokens) - 1, max_length - 1) if split else (0,):
                piece = tokens[start : start + max_length]
                writer.append(piece, ((1, len(piece)),), rows=row, truncated=not split and len(tokens) > max_length)
    if writer.num_samples == 0:
        raise DataError(f"{place}: every document is empty, so there is nothing to learn")
    return writer.finish()
