from itertools import pairwise

import pytest
from tokenizers.processors import TemplateProcessing

from tests.tiny import byte_tokenizer
from vamo_ft.config.data import TextFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.examples import Ids, TokenizedData
from vamo_ft.data.formatting import read_documents
from vamo_ft.data.sources import Rows
from vamo_ft.data.text import tokenize_documents

BOS, EOS = 1, 2


def ids(text: str) -> Ids:
    return tuple(byte_tokenizer().convert_tokens_to_ids(list(text)))


def tokenize(*texts: str, max_length: int = 100, split: bool = False, bos: bool = False) -> TokenizedData:
    tokenizer = byte_tokenizer()
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return tokenize_documents(texts, tokenizer, max_length=max_length, split=split, place="d")


def rows(data: TokenizedData) -> list[Ids]:
    return [data[index].token_ids for index in range(len(data))]


def test_documents_end_and_all_tokens_but_the_first_are_learnt() -> None:
    data = tokenize("abc", "d")
    assert rows(data) == [(*ids("abc"), EOS), (*ids("d"), EOS)]
    assert [data[index].supervised for index in (0, 1)] == [((1, 4),), ((1, 2),)]
    assert rows(tokenize("abc", bos=True)) == [(BOS, *ids("abc"), EOS)]


def test_longer_documents_lose_their_end() -> None:
    data = tokenize("abcdef", "abcd", "abcdefgh", max_length=5)
    assert rows(data) == [ids("abcde"), (*ids("abcd"), EOS), ids("abcde")]
    assert data.num_truncated == 2


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("max_length", [2, 4, 5])
def test_split_documents_are_learnt_once_token_by_token(length: int, max_length: int) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"[:length]
    data = tokenize(text, "z", max_length=max_length, split=True)
    pieces = [data[index] for index in range(len(data)) if data.rows_of(index) == (0,)]
    assert all(2 <= len(piece.token_ids) <= max_length for piece in pieces)
    assert [token for piece in pieces for token in piece.completion_ids] == [*ids(text)[1:], EOS]
    assert all(second.token_ids[0] == first.token_ids[-1] for first, second in pairwise(pieces))
    assert data.rows_of(len(data) - 1) == (1,)
    assert data.num_truncated == 0


def test_empty_documents_are_left_out() -> None:
    data = tokenize("", "ab", " \n", "c")
    assert rows(data) == [(*ids("ab"), EOS), (*ids("c"), EOS)]
    assert data.num_skipped == 2
    assert [data.rows_of(index) for index in (0, 1)] == [(1,), (3,)]
    with pytest.raises(DataError, match=r"^d: every document is empty, so there is nothing to learn"):
        tokenize("", " ")


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"^the tokenizer has no end-of-text token, with which a document has to end"):
        tokenize_documents(["a"], tokenizer, max_length=9, split=False, place="d")


def test_the_column() -> None:
    table = Rows("d.jsonl", ("body",), [{"body": "a"}, {"body": None}])
    documents = read_documents(table, TextFormat(type="text", column="body"))
    assert next(documents) == "a"
    with pytest.raises(DataError, match=r"^d\.jsonl: row 2: column 'body' is null"):
        next(documents)
    with pytest.raises(DataError, match=r"no column 'text' \(data\.format\.column\); the columns are body"):
        read_documents(table, TextFormat(type="text"))
