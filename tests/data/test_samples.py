from pathlib import Path
from typing import Any

import pytest

from tests.tiny import byte_tokenizer, sentiment_rows, write_jsonl
from vamo_ft.config.data import DataConfig
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.core.errors import DataError
from vamo_ft.core.protocols import SampleSource
from vamo_ft.data.loading import load_evaluation, load_samples
from vamo_ft.data.samples import EvaluationSamples, TrainingSamples

SENTIMENT = {"type": "classification", "template": "{sentence} It was", "labels": {0: "b", 1: "g"}}
WORDS = SENTIMENT | {"labels": {0: " bad", 1: " good!"}}
PAIRS = {"type": "prompt_completion", "prompt": "{sentence}", "completion": " {label}"}


def config_of(folder: Path, *, format: dict[str, Any], **keys: Any) -> DataConfig:
    train = write_jsonl(folder / "train.jsonl", sentiment_rows(23))
    dev = write_jsonl(folder / "dev.jsonl", sentiment_rows(11))
    return DataConfig(train={"path": str(train)}, evaluation={"path": str(dev)}, format=format, **keys)


def load(
    config: DataConfig, *, task: str = "causal_lm", batch_size: int = 4, **keys: Any
) -> tuple[TrainingSamples, EvaluationSamples]:
    training, evaluation = load_samples(
        config, byte_tokenizer(), task=task, batch_size=batch_size, seed=7, position_ids=True, offline=True, **keys
    )
    assert evaluation is not None
    return training, evaluation


@pytest.mark.parametrize(
    ("task", "format"),
    [("causal_lm", SENTIMENT), ("causal_lm", WORDS), ("causal_lm", PAIRS), ("sequence_classification", SENTIMENT)],
)
@pytest.mark.parametrize("budget", [1, 60, 200, 100_000])
def test_groups_and_batches_hold_every_sample_once_within_the_budget(
    tmp_path: Path, task: str, format: dict[str, Any], budget: int
) -> None:
    training, evaluation = load(config_of(tmp_path, format=format), task=task)
    indices = [22, *range(3, 20)]
    groups = training.groups(indices, token_budget=budget)
    assert sorted(index for group in groups for index in group) == sorted(indices)
    cells = [training.batch(group).inputs["input_ids"].numel() for group in groups]
    assert all(size <= budget or len(group) == 1 for size, group in zip(cells, groups, strict=True))
    widths = [training.batch([index]).inputs["input_ids"].shape[1] for group in groups for index in group]
    assert widths == sorted(widths, reverse=True)

    batches = list(evaluation.batches(token_budget=budget))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(11))
    assert all(batch.inputs["input_ids"].numel() <= budget or len(batch) == 1 for batch in batches)
    assert len(batches) == len(evaluation.groups(token_budget=budget))
    if budget == 100_000:
        assert len(groups) == len(batches) == 1


def test_groups_are_as_large_as_the_budget_allows_and_keep_the_order_of_ties(tmp_path: Path) -> None:
    training, _ = load(config_of(tmp_path, format=SENTIMENT))
    width = training.batch([0]).inputs["input_ids"].shape[1]  # samples 0, 10 and 20 are equally long
    assert training.groups([20, 0, 10], token_budget=2 * width) == [(20, 0), (10,)]
    assert training.groups([20, 0, 10], token_budget=3 * width - 1) == [(20, 0), (10,)]
    assert training.groups([20, 0, 10], token_budget=3 * width) == [(20, 0, 10)]
    assert training.groups([], token_budget=10) == []


def test_evaluation_batches_are_as_large_as_the_budget_allows(tmp_path: Path) -> None:
    _, evaluation = load(config_of(tmp_path, format=WORDS))
    [everything] = evaluation.batches(token_budget=10_000)
    assert len(everything) == 11
    assert len(evaluation.groups(token_budget=everything.inputs["input_ids"].numel())) == 1
    assert len(evaluation.groups(token_budget=everything.inputs["input_ids"].numel() - 1)) == 2


def test_the_training_samples_are_a_sample_source(tmp_path: Path) -> None:
    training, _ = load(config_of(tmp_path, format=SENTIMENT))
    source: SampleSource = training
    assert (source.num_samples, source.batch_size) == (23, 4)
    indices = source.step_indices(3)
    assert len(indices) == 4
    assert source.batch(indices).indices == indices
    assert [source.length(index) for index in range(23)] == [source.batch([index]).num_tokens for index in range(23)]
    assert sorted(index for step in range(23) for index in source.step_indices(step)) == sorted(list(range(23)) * 4)


def test_evaluation_scores_options(tmp_path: Path) -> None:
    _, single = load(config_of(tmp_path, format=SENTIMENT))
    [batch] = single.batches(token_budget=10_000)
    assert batch.inputs["input_ids"].shape[0] == 11
    assert set(batch.targets) == {"positions", "tokens", "option_tokens", "label"}
    assert batch.targets["label"].tolist() == [index % 2 for index in batch.indices]

    _, several = load(config_of(tmp_path, format=WORDS))
    [batch] = several.batches(token_budget=10_000)
    assert batch.inputs["input_ids"].shape[0] == 22
    assert set(batch.targets) == {"positions", "tokens", "label"}
    assert batch.targets["label"].tolist() == [index % 2 for index in batch.indices]
    assert batch.counts.tolist() == [[4, 6][index % 2] for index in batch.indices]


def test_a_prompt_is_the_same_in_training_and_under_every_option(tmp_path: Path) -> None:
    training, evaluation = load(config_of(tmp_path, format=WORDS, max_length=12))
    assert training.data.num_truncated == 23
    [batch] = evaluation.batches(token_budget=10_000)
    decode = byte_tokenizer().decode
    texts = [decode(row[mask.bool()]) for row, mask in zip(*list(batch.inputs.values())[:2], strict=True)]
    assert texts == ["It was ba", "It was good"] * 11  # the last token of an option is not read


def test_evaluation_of_completions_is_their_loss(tmp_path: Path) -> None:
    _, evaluation = load(config_of(tmp_path, format=PAIRS))
    [batch] = evaluation.batches(token_budget=10_000)
    assert set(batch.targets) == {"positions", "tokens"}
    assert batch.counts.tolist() == [3.0] * 11  # a space, a digit and the end


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    config = config_of(tmp_path, format=SENTIMENT)
    training, evaluation = load(config)
    again, evaluation_again = load(config, batch_size=8)
    assert training.fingerprint == again.fingerprint
    assert evaluation.fingerprint == evaluation_again.fingerprint
    rows = sentiment_rows(23)
    rows[22]["sentence"] = rows[22]["sentence"][:-1] + "x"
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert load(config)[0].fingerprint != training.fingerprint
    renamed = config_of(tmp_path, format=SENTIMENT | {"labels": {0: "b", 1: "g", 2: "h"}})
    assert load(renamed)[1].fingerprint != evaluation.fingerprint


@pytest.mark.parametrize(
    ("task", "format", "metric"),
    [
        ("causal_lm", SENTIMENT, "accuracy"),
        ("causal_lm", WORDS, "accuracy"),
        ("sequence_classification", SENTIMENT, "accuracy"),
        ("causal_lm", PAIRS, "f1"),
    ],
)
def test_a_metric_is_trained_on_evaluation_batches_in_which_every_sample_weighs_one(
    tmp_path: Path, task: str, format: dict[str, Any], metric: str
) -> None:
    config = config_of(tmp_path, format=format)
    config = config.model_copy(update={"evaluation": config.train})
    objective = MetricObjectiveConfig(type="metric", name=metric)
    training, evaluation = load(config, task=task, metric=objective, answer_tokens=objective.answer_tokens)
    indices = (22, 0, 4, 9)
    ours = training.batch(indices)
    theirs = evaluation._layout.collate([evaluation.data[index] for index in indices])
    assert ours.counts.tolist() == [1.0] * 4
    assert ours.indices == theirs.indices == indices
    for mine, other in ((ours.inputs, theirs.inputs), (ours.targets, theirs.targets)):
        assert {name: tensor.tolist() for name, tensor in mine.items()} == {
            name: tensor.tolist() for name, tensor in other.items()
        }
    for budget in (1, 100, 300, 100_000):
        assert training.groups(range(23), token_budget=budget) == evaluation.groups(token_budget=budget)
    assert training.fingerprint == load(config, task=task)[0].fingerprint


def test_training_samples_are_packed_and_evaluation_is_not(tmp_path: Path) -> None:
    config = config_of(tmp_path, format=PAIRS, max_length=60)
    alone, _ = load(config)
    packed, evaluation = load(config.model_copy(update={"packing": True}))
    assert packed.num_samples < 23
    assert sum(len(packed.data.rows_of(index)) for index in range(packed.num_samples)) == 23
    assert packed.data.tokens.buffer_info()[1] == alone.data.tokens.buffer_info()[1]
    batch = packed.batch([0, 1])
    assert set(batch.inputs) == {"input_ids", "position_ids"}
    assert batch.counts.tolist() == [3.0 * len(packed.data.rows_of(index)) for index in (0, 1)]
    assert packed.longest <= 60
    assert evaluation.num_samples == 11
    assert all("attention_mask" in batch.inputs for batch in evaluation.batches(token_budget=100))
    assert packed.fingerprint != alone.fingerprint


def test_groups_leave_room_for_the_answers(tmp_path: Path) -> None:
    config = config_of(tmp_path, format=PAIRS)
    _, evaluation = load(config, answer_tokens=20)
    batches = list(evaluation.batches(token_budget=150))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(11))
    assert {"positions", "tokens", "prompt_ids", "prompt_mask", "answer_ids"} == set(batches[0].targets)
    for batch in batches:
        rows, prompt = batch.targets["prompt_ids"].shape
        assert rows * (prompt + 20 - 1) <= 150 or rows == 1
    assert len(batches) > len(list(load(config, answer_tokens=2)[1].batches(token_budget=150)))


def test_scores_of_longer_answers_are_other_scores(tmp_path: Path) -> None:
    config = config_of(tmp_path, format=PAIRS)
    prints = {load(config, answer_tokens=tokens)[1].fingerprint for tokens in (None, 3, 4)}
    assert len(prints) == 3


def test_without_evaluation_data(tmp_path: Path) -> None:
    config = config_of(tmp_path, format=SENTIMENT)
    training, evaluation = load_samples(
        config.model_copy(update={"evaluation": None}),
        byte_tokenizer(),
        task="causal_lm",
        batch_size=2,
        seed=0,
        position_ids=False,
        offline=True,
    )
    assert evaluation is None
    assert "position_ids" not in training.batch([0]).inputs
    other = load_evaluation(config, config.train, byte_tokenizer(), task="causal_lm", position_ids=False, offline=True)
    assert other.num_samples == 23


def test_classifier_inputs_follow_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    keys = {"batch_size": 2, "seed": 0, "position_ids": True, "offline": True}
    config = config_of(tmp_path, format=SENTIMENT)
    training, _ = load_samples(config, tokenizer, task="sequence_classification", **keys)
    assert set(training.batch([0, 1]).inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="no padding token"):
        load_samples(config, tokenizer, task="sequence_classification", **keys)
