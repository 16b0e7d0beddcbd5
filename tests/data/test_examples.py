import random
from dataclasses import replace

from vamo_ft.data.examples import Example, TokenizedData, TokenWriter


def drawn(count: int) -> list[Example]:
    draw = random.Random(count)
    examples = []
    for index in range(count):
        length = draw.randrange(2, 12)
        inner = sorted(draw.sample(range(1, length), k=min(length - 1, draw.choice([1, 3])) // 2 * 2))
        last = draw.randrange(inner[-1] + 1 if inner else 1, length) if not inner or inner[-1] + 1 < length else None
        spans = tuple(zip(inner[::2], inner[1::2], strict=True)) + (() if last is None else ((last, length),))
        examples.append(
            Example(
                index,
                tuple(draw.randrange(99) for _ in range(length)),
                spans if spans and spans[-1][1] == length else (),
                draw.choice([None, 0, 1]),
                draw.choice([(), ((1, 2), (3,))]),
                draw.choice([(), ("a", "b c")]),
                draw.choice([(), (1, length)]),
            )
        )
    return examples


def written(examples: list[Example]) -> TokenizedData:
    writer = TokenWriter()
    for example in examples:
        writer.append(
            example.token_ids,
            example.supervised,
            label=example.label,
            options=example.options,
            references=example.references,
            documents=example.documents,
            rows=(7, 7) if example.documents else None,
        )
    return writer.finish()


def test_samples_come_back_as_they_were_written() -> None:
    examples = drawn(60)
    assert {len(example.supervised) for example in examples} >= {0, 1, 2}
    data = written(examples)
    assert len(data) == 60
    for example in examples:
        index = example.index
        assert data[index] == example
        assert data.length(index) == len(example.token_ids)
        assert data.prompt_length(index) == len(example.prompt_ids)
        assert data.input_length(index) == len(example.token_ids) - bool(example.supervised)
        assert data.num_supervised(index) == example.num_supervised
        assert example.prompt_ids + example.completion_ids == example.token_ids


def test_counts_of_what_was_cut_and_left_out() -> None:
    writer = TokenWriter()
    writer.append((1, 2), ((1, 2),), truncated=True)
    writer.skip()
    writer.skip()
    writer.append((1, 2), ((1, 2),))
    writer.skip()
    assert writer.next_row == 5
    data = writer.finish()
    assert (len(data), data.num_truncated, data.num_skipped) == (2, 1, 3)
    assert [data.rows_of(index) for index in (0, 1)] == [(0,), (3,)]


def test_packed_samples_come_from_several_rows() -> None:
    writer = TokenWriter()
    writer.append((1, 2, 3, 4), ((1, 4),), documents=(2, 4), rows=(4, 0))
    writer.append((1, 2), ((1, 2),), rows=(1,))
    writer.append((1, 2, 3, 4, 5, 6), ((1, 6),), documents=(2, 4, 6), rows=(2, 2, 3))
    data = writer.finish()
    assert [data.rows_of(index) for index in range(3)] == [(4, 0), (1,), (2, 2, 3)]


def test_the_fingerprint_covers_everything_that_is_learnt_or_scored() -> None:
    base = Example(0, (1, 2, 3, 4), ((1, 2), (3, 4)), 0, ((1,), (2,)), ("a",), (2, 4))
    others = [
        replace(base, token_ids=(1, 2, 3, 5)),
        replace(base, supervised=((1, 4),)),
        replace(base, supervised=((2, 3), (3, 4))),
        replace(base, label=1),
        replace(base, options=((1, 2),)),
        replace(base, references=("b",)),
        replace(base, documents=(3, 4)),
    ]
    prints = {written([each]).fingerprint for each in (base, *others)}
    assert len(prints) == 1 + len(others)
    assert written([base, base]).fingerprint not in prints
    assert written([base]).fingerprint in prints
