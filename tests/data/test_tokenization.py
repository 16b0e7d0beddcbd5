from collections.abc import Sequence
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer
from vamo_ft.core.errors import DataError
from vamo_ft.data.examples import TokenizedData
from vamo_ft.data.formatting import TextExample
from vamo_ft.data.tokenization import (
    tokenize_for_classifier,
    tokenize_for_language_model,
    tokenize_options,
)

BOS, EOS = 1, 2
Ids = tuple[int, ...]


def with_special_tokens(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def ids(text: str) -> Ids:
    """Token ids looked up one character at a time."""
    tokenizer = byte_tokenizer()
    return tuple(tokenizer.convert_tokens_to_ids("Ġ" if character == " " else character) for character in text)


def tokenize(
    *texts: tuple[str, str],
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_length: int = 100,
    options: Sequence[Ids] | None = None,
) -> TokenizedData:
    examples = [
        TextExample(prompt, completion, None if options is None else options.index(ids(completion)))
        for prompt, completion in texts
    ]
    return tokenize_for_language_model(
        examples, tokenizer or byte_tokenizer(), max_length=max_length, options=options, place="d.jsonl"
    )


def pairs(data: TokenizedData) -> list[tuple[Ids, Ids]]:
    return [(data[index].prompt_ids, data[index].completion_ids) for index in range(len(data))]


def test_completions_end_and_keep_their_leading_space() -> None:
    data = tokenize(("ab", " c"), ("d", "ef"))
    assert pairs(data) == [(ids("ab"), (*ids(" c"), EOS)), (ids("d"), (*ids("ef"), EOS))]
    assert [data[index].index for index in (0, 1)] == [0, 1]
    assert [data[index].label for index in (0, 1)] == [None, None]
    assert data.num_truncated == 0
    assert [data.input_length(index) for index in (0, 1)] == [4, 3]
    assert [data.prompt_length(index) for index in (0, 1)] == [2, 1]


def test_classification_completions_are_the_options_alone() -> None:
    data = tokenize(("ab", " yes"), ("c", " no"), options=[ids(" no"), ids(" yes")])
    assert pairs(data) == [(ids("ab"), ids(" yes")), (ids("c"), ids(" no"))]
    assert [data[index].label for index in (0, 1)] == [1, 0]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_prompts_start_with_the_tokenizers_bos_and_never_end_with_its_eos(template: str) -> None:
    data = tokenize(("ab", "c"), ("", "c"), tokenizer=with_special_tokens(template))
    assert pairs(data) == [((BOS, *ids("ab")), (*ids("c"), EOS)), ((BOS,), (*ids("c"), EOS))]


def test_truncation_cuts_the_beginning_of_the_prompt() -> None:
    data = tokenize(("abcdef", "xy"), ("abcde", "x"), ("abc", "xyz"), max_length=6)
    assert [prompt for prompt, _ in pairs(data)] == [ids("def"), ids("bcde"), ids("bc")]
    assert [completion[:-1] for _, completion in pairs(data)] == [ids("xy"), ids("x"), ids("xyz")]
    assert data.num_truncated == 3
    assert tokenize(("abc", "xy"), max_length=6).num_truncated == 0


@pytest.mark.parametrize(("max_length", "prompt"), [(7, "cdef"), (4, "f"), (3, "")])
def test_truncation_keeps_bos(max_length: int, prompt: str) -> None:
    data = tokenize(("abcdef", "x"), tokenizer=with_special_tokens("<s> $A"), max_length=max_length)
    assert pairs(data) == [((BOS, *ids(prompt)), (*ids("x"), EOS))]
    assert data.num_truncated == 1


@pytest.mark.parametrize(("max_length", "prompt"), [(5, (BOS, BOS, *ids("f"))), (4, (BOS, BOS)), (3, (BOS,))])
def test_truncation_cuts_leading_special_tokens_last(max_length: int, prompt: Ids) -> None:
    data = tokenize(("abcdef", "x"), tokenizer=with_special_tokens("<s> <s> $A"), max_length=max_length)
    assert data[0].prompt_ids == prompt


def test_options_of_any_length_share_the_prompt() -> None:
    options = [ids("n"), ids("yes")]
    data = tokenize(("abcdef", "n"), ("abcdef", "yes"), max_length=5, options=options)
    assert pairs(data) == [(ids("ef"), ids("n")), (ids("ef"), ids("yes"))]


def test_completion_without_room_for_a_prompt() -> None:
    assert tokenize(("abc", "xyz"), max_length=5).num_truncated == 1
    with pytest.raises(
        DataError, match=r"^d\.jsonl: row 2: a completion of 5 tokens leaves no room .* data\.max_length 5; raise it"
    ):
        tokenize(("abc", "xyz"), ("abc", "wxyz"), max_length=5)
    with pytest.raises(DataError, match=r"row 1: a completion of 3 tokens"):
        tokenize(("abc", "n"), max_length=3, options=[ids("n"), ids("yes")])


def test_empty_prompt() -> None:
    tokenizer = byte_tokenizer()
    assert pairs(tokenize(("", "x"), tokenizer=tokenizer))[0][0] == (BOS,)
    tokenizer.bos_token = None
    assert pairs(tokenize(("", "x"), tokenizer=tokenizer))[0][0] == (EOS,)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"^d\.jsonl: row 1: the prompt has no tokens"):
        tokenize(("", "x"), tokenizer=tokenizer, options=[ids("x")])
    with pytest.raises(DataError, match=r"^the tokenizer has no end-of-text token"):
        tokenize(("a", "x"), tokenizer=tokenizer)


def test_options() -> None:
    assert tokenize_options({"0": " no", "1": "yes"}, with_special_tokens("<s> $A </s>")) == (ids(" no"), ids("yes"))
    with pytest.raises(DataError, match=r"^data\.format\.labels\.1: the text '' has no tokens"):
        tokenize_options({"0": "a", "1": ""}, byte_tokenizer())
    lowercase = byte_tokenizer()
    from tokenizers.normalizers import Lowercase

    lowercase.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(DataError, match=r"^data\.format\.labels: 0 and 2 have the same tokens"):
        tokenize_options({"0": "a", "1": "b", "2": "A"}, lowercase)


def test_classifier_texts_keep_their_beginning_and_all_special_tokens() -> None:
    examples = [TextExample("abcdef", "", 1), TextExample("ab", "", 0), TextExample("", "", 0)]
    data = tokenize_for_classifier(examples, with_special_tokens("<s> $A </s>"), max_length=5, place="d")
    assert [data[index].prompt_ids for index in range(3)] == [
        (BOS, *ids("abc"), EOS),
        (BOS, *ids("ab"), EOS),
        (BOS, EOS),
    ]
    assert all(data[index].completion_ids == () for index in range(3))
    assert [data.input_length(index) for index in range(3)] == [5, 4, 2]
    assert data.num_truncated == 1
    assert tokenize_for_classifier(examples[2:], byte_tokenizer(), max_length=5, place="d")[0].prompt_ids == (BOS,)


def test_more_rows_than_one_chunk_keep_their_numbers() -> None:
    data = tokenize(*((f"p{row}", f"c{row}") for row in range(2500)))
    assert len(data) == 2500
    assert pairs(data)[2345] == (ids("p2345"), (*ids("c2345"), EOS))
    with pytest.raises(DataError, match="row 1501:"):
        tokenize(*[("a", "b")] * 1500, ("a", "b" * 100))


def test_the_fingerprint_changes_with_any_token_boundary_or_label() -> None:
    options = [ids("x"), ids("y"), ids("bx")]
    same, *others = [
        tokenize(("ab", "x"), ("c", "y"), options=options),
        tokenize(("ab", "x"), ("d", "y"), options=options),
        tokenize(("ab", "x"), ("c", "x"), options=options),
        tokenize(("a", "bx"), ("c", "y"), options=options),
        tokenize(("ab", "x"), options=options),
    ]
    assert tokenize(("ab", "x"), ("c", "y"), options=options).fingerprint == same.fingerprint
    assert len({same.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert tokenize(("ab", "x")).tokens == tokenize(("a", "bx")).tokens
    assert tokenize(("ab", "x")).fingerprint != tokenize(("a", "bx")).fingerprint
    relabelled = replace(same, labels=(0, 0))
    assert relabelled.fingerprint != same.fingerprint
