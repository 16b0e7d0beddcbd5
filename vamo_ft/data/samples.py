"""The samples of a run: what training draws from, and what evaluation goes through."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

from vamo_ft.config.schema import ClassificationFormat, DataConfig, DataSetConfig
from vamo_ft.core.errors import DataError
from vamo_ft.core.types import Batch
from vamo_ft.data.collation import collate_for_classifier, collate_for_language_model, collate_options
from vamo_ft.data.formatting import format_rows
from vamo_ft.data.order import SampleOrder
from vamo_ft.data.sources import load_rows
from vamo_ft.data.tokenization import (
    Example,
    TokenizedData,
    tokenize_for_classifier,
    tokenize_for_language_model,
    tokenize_options,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EvaluationSamples", "Task", "TrainingSamples", "load_evaluation", "load_samples"]

Task = Literal["causal_lm", "sequence_classification"]
Collate = Callable[[Sequence[Example]], Batch]


class TrainingSamples:
    """The training data and the order in which steps take it; a `core.protocols.SampleSource`.

    Args:
        data: the tokenized samples.
        collate: makes a batch of them.
        batch_size: samples of one step.
        seed: keys the order.
    """

    def __init__(self, data: TokenizedData, *, collate: Collate, batch_size: int, seed: int) -> None:
        self.data = data
        self._collate = collate
        self._batch_size = batch_size
        self._order = SampleOrder(len(data), batch_size=batch_size, seed=seed)

    @property
    def num_samples(self) -> int:
        """Number of samples, indexed 0 to num_samples - 1."""
        return len(self.data)

    @property
    def batch_size(self) -> int:
        """Samples of one training step."""
        return self._batch_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every token and label."""
        return self.data.fingerprint

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order."""
        return self._collate([self.data[index] for index in indices])

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """`indices`, longest first, cut so that samples times longest length stays within `token_budget`.

        A sample longer than the budget is a group of its own.
        """
        return _cut(indices, lengths=[self.data.input_length(index) for index in indices], token_budget=token_budget)

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of training step `step`, counted from 0."""
        return self._order.step_indices(step)


class EvaluationSamples:
    """Held-out data, gone through once per evaluation.

    Args:
        data: the tokenized samples.
        collate: makes a batch of them.
        options: tokens of each class that `collate` scores; empty when it scores none.
    """

    def __init__(self, data: TokenizedData, *, collate: Collate, options: Sequence[tuple[int, ...]] = ()) -> None:
        self.data = data
        self._collate = collate
        self._options = tuple(options)

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.data)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token, label and option."""
        return sha256(f"{self.data.fingerprint} {self._options}".encode()).hexdigest()

    def batches(self, *, token_budget: int) -> Iterator[Batch]:
        """Every sample once, longest first; rows times longest length stays within `token_budget` where it can."""
        for group in self.groups(token_budget=token_budget):
            yield self._collate([self.data[index] for index in group])

    def groups(self, *, token_budget: int) -> list[tuple[int, ...]]:
        """The samples of each batch, so that their number is known beforehand."""
        indices = range(self.num_samples)
        if not self._options:
            return _cut(
                indices, lengths=[self.data.input_length(index) for index in indices], token_budget=token_budget
            )
        longest = max(len(option) for option in self._options)
        return _cut(
            indices,
            lengths=[self.data.prompt_length(index) + longest - 1 for index in indices],
            token_budget=token_budget,
            rows_per_sample=len(self._options) if longest > 1 else 1,
        )


def load_samples(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Task,
    batch_size: int,
    seed: int,
    position_ids: bool,
    offline: bool,
) -> tuple[TrainingSamples, EvaluationSamples | None]:
    """Reads, formats and tokenizes the data of a run.

    Args:
        position_ids: whether the model's forward pass takes `position_ids`.
        offline: make no network call.

    Raises:
        DataError: the data is not what the configuration says.
    """
    data = _tokenize(config, config.train, tokenizer, task=task, offline=offline)
    collate = _collate(tokenizer, task=task, position_ids=position_ids)
    training = TrainingSamples(data, collate=collate, batch_size=batch_size, seed=seed)
    if config.evaluation is None:
        return training, None
    evaluation = load_evaluation(
        config, config.evaluation, tokenizer, task=task, position_ids=position_ids, offline=offline
    )
    return training, evaluation


def load_evaluation(
    config: DataConfig,
    data_set: DataSetConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Task,
    position_ids: bool,
    offline: bool,
) -> EvaluationSamples:
    """Reads, formats and tokenizes `data_set` for evaluation, by the format and length of `config`.

    Raises:
        DataError: the data is not what the configuration says.
    """
    data = _tokenize(config, data_set, tokenizer, task=task, offline=offline)
    if task == "causal_lm" and isinstance(config.format, ClassificationFormat):
        options = tokenize_options(config.format.labels, tokenizer)
        pad = _pad_token_id(tokenizer)
        collate = partial(collate_options, options=options, pad_token_id=pad, position_ids=position_ids)
        return EvaluationSamples(data, collate=collate, options=options)
    return EvaluationSamples(data, collate=_collate(tokenizer, task=task, position_ids=position_ids))


def _tokenize(
    config: DataConfig, data_set: DataSetConfig, tokenizer: "PreTrainedTokenizerBase", *, task: Task, offline: bool
) -> TokenizedData:
    rows = load_rows(data_set, offline=offline)
    examples = format_rows(rows, config.format)
    if task == "sequence_classification":
        return tokenize_for_classifier(examples, tokenizer, max_length=config.max_length, place=rows.place)
    options = None
    if isinstance(config.format, ClassificationFormat):
        options = tokenize_options(config.format.labels, tokenizer)
    return tokenize_for_language_model(
        examples, tokenizer, max_length=config.max_length, options=options, place=rows.place
    )


def _collate(tokenizer: "PreTrainedTokenizerBase", *, task: Task, position_ids: bool) -> Collate:
    pad = _pad_token_id(tokenizer)
    if task == "sequence_classification":
        types = "token_type_ids" in tokenizer.model_input_names
        return partial(collate_for_classifier, pad_token_id=pad, token_type_ids=types)
    return partial(collate_for_language_model, pad_token_id=pad, position_ids=position_ids)


def _pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token; name one as pad_token in its tokenizer_config.json")
    return int(tokenizer.pad_token_id)


def _cut(
    indices: Sequence[int], *, lengths: Sequence[int], token_budget: int, rows_per_sample: int = 1
) -> list[tuple[int, ...]]:
    """`indices` by falling length, ties in their order: trouble with memory shows in the first group."""
    groups: list[list[int]] = []
    room = 0  # samples that still fit the open group
    for place in sorted(range(len(indices)), key=lambda place: -lengths[place]):
        if room == 0:
            groups.append([])
            room = max(1, token_budget // (lengths[place] * rows_per_sample))
        groups[-1].append(indices[place])
        room -= 1
    return [tuple(group) for group in groups]
