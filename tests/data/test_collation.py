import random

import pytest
import torch
from torch import Tensor

from tests.tiny import pair, tiny_llama
from vamo_ft.core.types import Batch
from vamo_ft.data.collation import (
    collate_for_classifier,
    collate_for_generation,
    collate_for_language_model,
    collate_options,
)
from vamo_ft.data.examples import Example, Ids, Spans

PAD = 0


def example(prompt: list[int], completion: list[int], *, index: int = 0, label: int | None = None) -> Example:
    return pair(index, tuple(prompt), tuple(completion), label)


def random_examples(count: int) -> list[Example]:
    draw = random.Random(count)
    return [
        example(
            [draw.randrange(1, 99) for _ in range(draw.randrange(1, 9))],
            [draw.randrange(1, 99) for _ in range(draw.randrange(1, 6))],
            index=100 + index,
        )
        for index in range(count)
    ]


def random_conversations(count: int) -> list[Example]:
    """Two to five turns each, some of them supervised and the last one always."""
    draw = random.Random(-count)
    examples = []
    for index in range(count):
        tokens, spans = [draw.randrange(1, 99)], []
        for turn in range(turns := draw.randrange(2, 6)):
            start = len(tokens)
            tokens += [draw.randrange(1, 99) for _ in range(draw.randrange(1, 5))]
            if turn == turns - 1 or draw.random() < 0.5:
                spans.append((start, len(tokens)))
        examples.append(Example(index, tuple(tokens), tuple(spans)))
    return examples


def whole(prompt: Ids, completion: Ids) -> tuple[Ids, Spans]:
    return prompt + completion, ((len(prompt), len(prompt + completion)),)


def reference(rows: list[tuple[Ids, Spans]]) -> tuple[dict[str, list], dict[str, list]]:
    """Column by column: where is each token of each row, and is the next one supervised?"""
    width = max(len(tokens) for tokens, _ in rows) - 1
    cells: list[list[tuple[int, int, int, int | None]]] = []  # input id, mask, position, supervised next token
    for tokens, spans in rows:
        row = [(PAD, 0, 0, None)] * (width - len(tokens) + 1)
        for place in range(len(tokens) - 1):
            supervised = any(start <= place + 1 < end for start, end in spans)
            row.append((tokens[place], 1, place, tokens[place + 1] if supervised else None))
        cells.append(row)
    positions = [column for column in range(width) if any(row[column][3] is not None for row in cells)]
    inputs = {
        "input_ids": [[cell[0] for cell in row] for row in cells],
        "attention_mask": [[cell[1] for cell in row] for row in cells],
        "position_ids": [[cell[2] for cell in row] for row in cells],
    }
    tokens = [[-100 if row[column][3] is None else row[column][3] for column in positions] for row in cells]
    return inputs, {"positions": positions, "tokens": tokens}


def as_lists(tensors: dict[str, Tensor]) -> dict[str, list]:
    assert all(tensor.dtype == torch.int64 for tensor in tensors.values())
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def counts_of(batch: Batch) -> list[float]:
    assert batch.counts.dtype == torch.float32
    return batch.counts.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_language_model_batches_equal_the_reference(count: int) -> None:
    examples = random_examples(count)
    batch = collate_for_language_model(examples, pad_token_id=PAD, position_ids=True)
    inputs, targets = reference([(row.token_ids, row.supervised) for row in examples])
    assert as_lists(batch.inputs) == inputs
    assert as_lists(batch.targets) == targets
    assert counts_of(batch) == [len(row.completion_ids) for row in examples]
    assert batch.num_tokens == sum(len(row.prompt_ids) + len(row.completion_ids) - 1 for row in examples)
    assert batch.num_supervised == sum(len(row.completion_ids) for row in examples)
    assert batch.indices == tuple(range(100, 100 + count))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_runs_anywhere_in_a_row_equal_the_reference(count: int) -> None:
    examples = random_conversations(count)
    batch = collate_for_language_model(examples, pad_token_id=PAD, position_ids=True)
    inputs, targets = reference([(row.token_ids, row.supervised) for row in examples])
    assert as_lists(batch.inputs) == inputs
    assert as_lists(batch.targets) == targets
    supervised = [sum(end - start for start, end in row.supervised) for row in examples]
    assert counts_of(batch) == supervised
    assert batch.num_supervised == sum(supervised)
    assert batch.num_tokens == sum(len(row.token_ids) - 1 for row in examples)


def test_the_last_of_several_runs_is_the_answer() -> None:
    examples = [Example(0, (5, 6, 7, 8, 9), ((1, 2), (3, 5))), Example(1, (3, 4), ((1, 2),))]
    targets = as_lists(collate_for_generation(examples, pad_token_id=PAD, position_ids=True).targets)
    assert targets["prompt_ids"] == [[5, 6, 7], [0, 0, 3]]
    assert targets["answer_ids"] == [[8, 9], [-100, 4]]
    assert targets["positions"] == [0, 2, 3]
    assert targets["tokens"] == [[6, 8, 9], [-100, -100, 4]]


def test_a_batch_by_hand() -> None:
    batch = collate_for_language_model(
        [example([5, 6, 7], [8]), example([9], [10, 11])], pad_token_id=PAD, position_ids=False
    )
    assert as_lists(batch.inputs) == {"input_ids": [[5, 6, 7], [0, 9, 10]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    assert as_lists(batch.targets) == {"positions": [1, 2], "tokens": [[-100, 8], [10, 11]]}


def test_padding_does_not_change_what_a_model_predicts() -> None:
    examples = random_examples(4)
    batch = collate_for_language_model(examples, pad_token_id=PAD, position_ids=True)
    model = tiny_llama()
    with torch.no_grad():
        logits = model(**batch.inputs).logits[:, batch.targets["positions"]]
        for row, sample in enumerate(examples):
            sequence = torch.tensor([sample.prompt_ids + sample.completion_ids])
            alone = model(sequence).logits[0, len(sample.prompt_ids) - 1 : -1]
            supervised = batch.targets["tokens"][row] != -100
            torch.testing.assert_close(logits[row, supervised], alone, rtol=1e-4, atol=1e-5)
            assert batch.targets["tokens"][row, supervised].tolist() == list(sample.completion_ids)


def test_generation_adds_the_prompts_alone() -> None:
    examples = [example([5, 6, 7], [8, 2], index=4), example([9], [10, 11, 12, 2], index=9)]
    batch = collate_for_generation(examples, pad_token_id=PAD, position_ids=True)
    plain = collate_for_language_model(examples, pad_token_id=PAD, position_ids=True)
    assert as_lists(batch.inputs) == as_lists(plain.inputs)
    assert as_lists(batch.targets) == as_lists(plain.targets) | {
        "prompt_ids": [[5, 6, 7], [0, 0, 9]],
        "prompt_mask": [[1, 1, 1], [0, 0, 1]],
        "answer_ids": [[-100, -100, 8, 2], [10, 11, 12, 2]],
    }
    assert torch.equal(batch.targets["tokens"], batch.targets["answer_ids"])
    assert (counts_of(batch), batch.indices, batch.num_tokens) == ([2, 4], (4, 9), plain.num_tokens)


def test_options_of_one_token_share_a_row() -> None:
    options = [(50,), (51,), (52,)]
    examples = [example([1, 2, 3], [51], index=4, label=1), example([7], [50], index=9, label=0)]
    batch = collate_options(examples, options=options, pad_token_id=PAD, position_ids=True)
    assert as_lists(batch.inputs) == {
        "input_ids": [[1, 2, 3], [0, 0, 7]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
    }
    assert as_lists(batch.targets) == {
        "positions": [2],
        "tokens": [[51], [50]],
        "option_tokens": [50, 51, 52],
        "label": [1, 0],
    }
    assert counts_of(batch) == [1, 1]
    assert batch.indices == (4, 9)
    assert (batch.num_tokens, batch.num_supervised) == (4, 2)


def test_longer_options_have_rows_of_their_own() -> None:
    options = [(50, 60), (51,), (52, 61, 62)]
    examples = [example([1, 2, 3], [52, 61, 62], index=4, label=2), example([7], [51], index=9, label=1)]
    batch = collate_options(examples, options=options, pad_token_id=PAD, position_ids=True)
    inputs, targets = reference([whole(row.prompt_ids, option) for row in examples for option in options])
    assert as_lists(batch.inputs) == inputs
    assert as_lists(batch.targets) == targets | {"label": [2, 1]}
    assert batch.targets["tokens"].shape == (6, 3)
    assert counts_of(batch) == [3, 1]
    assert batch.indices == (4, 9)
    assert batch.num_tokens == (4 + 3 + 5) + (2 + 1 + 3)
    assert batch.num_supervised == 2 * (2 + 1 + 3)


@pytest.mark.parametrize("token_type_ids", [False, True])
def test_classifier_batches_are_padded_on_the_right(token_type_ids: bool) -> None:
    examples = [example([5, 6, 7], [], index=1, label=1), example([8], [], index=2, label=0)]
    batch = collate_for_classifier(examples, pad_token_id=3, token_type_ids=token_type_ids)
    inputs = {"input_ids": [[5, 6, 7], [8, 3, 3]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
    types = {"token_type_ids": [[0, 0, 0], [0, 0, 0]]} if token_type_ids else {}
    assert as_lists(batch.inputs) == inputs | types
    assert as_lists(batch.targets) == {"label": [1, 0]}
    assert counts_of(batch) == [1, 1]
    assert (batch.num_tokens, batch.num_supervised) == (4, 2)
    assert batch.indices == (1, 2)
