"""Samples of a data set, and solved examples in front of prompts."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import byte_tokenizer, write_jsonl
from vamo_ft.config.data import ClassificationFormat, DataConfig, DataSetConfig
from vamo_ft.config.sampling import SampleConfig
from vamo_ft.config.tasks import TaskFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.formatting import format_rows
from vamo_ft.data.loading import load_samples
from vamo_ft.data.rows import Rows
from vamo_ft.data.sampling import sample_rows
from vamo_ft.data.shots import draw_demonstrations

FORMAT = ClassificationFormat(type="classification", template="{x}", label="y", labels={"0": "a", "1": "b"})


def rows_of(labels: list[Any]) -> Rows:
    return Rows("here", ("x", "y"), [{"x": str(number), "y": label} for number, label in enumerate(labels)])


def drawn(rows: Rows, **keys: Any) -> list[int]:
    """The numbers of the rows in a sample, which must be the rows themselves."""
    sample = sample_rows(rows, SampleConfig(**keys), FORMAT)
    assert sample.numbers is not None
    assert [rows.rows[number] for number in sample.numbers] == list(sample.rows)
    assert [sample.place_of(row) for row in range(len(sample))] == [f"here: row {n + 1}" for n in sample.numbers]
    return list(sample.numbers)


def test_a_sample_is_in_order_without_repeats_and_follows_its_seed() -> None:
    rows = rows_of([0] * 50)
    first = drawn(rows, size=20)
    assert first == sorted(set(first)) and len(first) == 20
    assert first == drawn(rows, size=20) != drawn(rows, size=20, seed=1)
    assert set(drawn(rows, size=5)) < set(first)
    counts = Counter(number for seed in range(200) for number in drawn(rows, size=10, seed=seed))
    assert len(counts) == 50 and max(counts.values()) < 70  # each 40 times, give or take 5.7


def test_samples_that_skip_what_others_take_share_nothing() -> None:
    rows = rows_of([0, 1, 1, 1] * 10)
    parts = [drawn(rows, size=15), drawn(rows, size=15, skip=15), drawn(rows, size=10, skip=30)]
    assert sorted(number for part in parts for number in part) == list(range(40))
    first, second = drawn(rows, per_class=5), drawn(rows, per_class=5, skip=5)
    assert set(first).isdisjoint(second)
    for part in (first, second):
        assert Counter(rows.rows[number]["y"] for number in part) == {0: 5, 1: 5}


def test_the_classes_may_be_written_in_any_spelling() -> None:
    assert len(drawn(rows_of([1, "1", 1.0, "0", 0]), per_class=2)) == 4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"size": 6}, "here: the sample takes 6 rows, and there are 5 rows"),
        ({"size": 4, "skip": 2}, "here: the sample takes 4 rows after 2 are skipped, and there are 5 rows"),
        (
            {"per_class": 2, "skip": 1},
            "here: the sample takes 2 rows after 1 are skipped, and there are 2 of class '1'",
        ),
    ],
)
def test_too_few_rows(keys: dict[str, int], said: str) -> None:
    with pytest.raises(DataError) as caught:
        sample_rows(rows_of([0, 0, 0, 1, 1]), SampleConfig(**keys), FORMAT)
    assert str(caught.value) == said


def test_a_class_that_never_occurs_is_missed() -> None:
    with pytest.raises(DataError, match="here: the sample takes 2 rows, and there are 0 of class '1'"):
        drawn(rows_of([0] * 9), per_class=2)


def test_a_tasks_classes_may_be_numbers_and_names_at_once() -> None:
    labels = ["entailment", 0, 1, "not_entailment", 0, 1]
    sample = sample_rows(rows_of_task(labels), SampleConfig(per_class=3), TaskFormat(type="task", name="rte"))
    assert len(sample) == 6
    with pytest.raises(DataError, match="there are 1 of class 'not_entailment'"):
        sample_rows(rows_of_task(labels[:3]), SampleConfig(per_class=2), TaskFormat(type="task", name="rte"))


def rows_of_task(labels: list[Any]) -> Rows:
    return Rows("here", ("label",), [{"label": label} for label in labels])


def test_a_row_without_a_label_is_named() -> None:
    with pytest.raises(DataError, match="here: row 2: column 'y' is null"):
        sample_rows(rows_of([0, None]), SampleConfig(per_class=1), FORMAT)


def test_messages_name_the_lines_of_a_sample(tmp_path: Path) -> None:
    rows = [{"x": f"row {number}", "y": 0} for number in range(9)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    data_set = DataSetConfig(path=str(file), sample=SampleConfig(size=4))
    numbers = drawn(Rows("here", ("x", "y"), rows), size=4)
    assert numbers != [0, 1, 2, 3]
    keys: dict[str, Any] = {"task": "causal_lm", "batch_size": 2, "seed": 0, "position_ids": True, "offline": True}
    config = DataConfig(train=data_set, format=FORMAT)
    training, _ = load_samples(config, byte_tokenizer(), **keys)
    assert [training.data.rows_of(index) for index in range(4)] == [(number,) for number in numbers]
    rows[numbers[2]]["y"] = 7
    write_jsonl(file, rows)
    with pytest.raises(DataError, match=rf"row {numbers[2] + 1}: label '7' is not among"):
        load_samples(config, byte_tokenizer(), **keys)


def sentences(count: int) -> Rows:
    rows = [{"sentence": f"film {number}", "label": number % 2} for number in range(count)]
    return Rows("here", ("sentence", "label"), rows)


def prompts(rows: Rows, **keys: Any) -> list[str]:
    config = TaskFormat(type="task", name="sst2", **keys)
    demonstrations = draw_demonstrations(rows, config)
    return [example.prompt for example in format_rows(rows, config, demonstrations=demonstrations)]


def test_solved_examples_stand_before_every_prompt_and_no_sample_sees_itself() -> None:
    rows = sentences(12)
    found = prompts(rows, shots=3)
    solved = [f"film {n} It was {['terrible', 'great'][n % 2]}" for n in range(12)]
    shown = []
    for number, prompt in enumerate(found):
        *shots, own = prompt.split("\n\n")
        assert own == f"film {number} It was"
        assert len(shots) == 3 and set(shots) <= set(solved) and solved[number] not in shots
        shown.append(tuple(shots))
    [usual, *others] = [shots for shots, _ in Counter(shown).most_common()]
    assert shown.count(usual) == 9  # the same for all but those who are among them
    for shots in others:
        [own] = [number for number in range(12) if shown[number] == shots]
        assert solved[own] in usual
    assert prompts(rows, shots=3) == found != prompts(rows, shots=3, shot_seed=1)


def test_examples_do_not_repeat_and_have_to_be_there() -> None:
    config = TaskFormat(type="task", name="sst2", shots=2)
    rows = Rows("here", ("sentence", "label"), [*sentences(2).rows] * 5)
    with pytest.raises(
        DataError, match=r"here: data\.format\.shots: 2 examples and one to spare, .* its 2 different rows"
    ):
        draw_demonstrations(rows, config)
    three = Rows("here", ("sentence", "label"), [*sentences(3).rows] * 5)
    assert len(set(draw_demonstrations(three, config).samples)) == 3


def test_held_out_samples_are_shown_training_rows(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", sentences(6).rows)
    other = [{"sentence": f"play {number}", "label": 0} for number in range(5)] + [sentences(6).rows[4]]
    dev = write_jsonl(tmp_path / "dev.jsonl", other)
    config = DataConfig(
        train={"path": str(train), "sample": {"size": 4}},
        evaluation={"path": str(dev)},
        format={"type": "task", "name": "sst2", "shots": 3},
    )
    tokenizer = byte_tokenizer()
    training, evaluation = load_samples(
        config, tokenizer, task="causal_lm", batch_size=2, seed=0, position_ids=True, offline=True
    )
    assert evaluation is not None

    def texts(samples: Any) -> list[list[str]]:
        return [tokenizer.decode(samples.data[i].prompt_ids).split("\n\n") for i in range(samples.num_samples)]

    drawn_rows = {own for *_, own in texts(training)}
    assert len(drawn_rows) == 4
    for *shots, own in texts(evaluation):
        shown = {shot.replace(" terrible", "").replace(" great", "") for shot in shots}
        assert len(shown) == 3 and shown <= drawn_rows - {own}
