"""The samples of a run: what training draws from, and what evaluation goes through."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from vamo_ft.config.data import ChatFormat, ClassificationFormat, DataConfig, DataSetConfig, TextFormat
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.core.errors import DataError, StopRequested
from vamo_ft.core.types import Batch
from vamo_ft.data.chat import tokenize_conversations
from vamo_ft.data.collation import (
    collate_for_classifier,
    collate_for_generation,
    collate_for_language_model,
    collate_options,
    collate_packed,
)
from vamo_ft.data.conversations import read_conversations
from vamo_ft.data.examples import Example, TokenizedData
from vamo_ft.data.formatting import format_rows, read_documents
from vamo_ft.data.order import SampleOrder
from vamo_ft.data.packing import pack
from vamo_ft.data.parts import Part, part_indices
from vamo_ft.data.sources import load_rows
from vamo_ft.data.text import tokenize_documents
from vamo_ft.data.tokenization import (
    tokenize_for_classifier,
    tokenize_for_language_model,
    tokenize_options,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EvaluationSamples", "Task", "TrainingSamples", "load_evaluation", "load_samples"]

Task = Literal["causal_lm", "sequence_classification"]
T = TypeVar("T")
Collate = Callable[[Sequence[Example]], Batch]


@dataclass(frozen=True, slots=True)
class Layout:
    """How samples are put into a batch, and the room they take there.

    Attributes:
        collate: makes a batch of samples.
        length: tokens of the longest row of the sample at an index, generated ones included.
        rows_per_sample: rows of one sample.
        scored_by: what decides the scores beside the data: tokens of each class, or the longest answer.
    """

    collate: Collate
    length: Callable[[TokenizedData, int], int] = TokenizedData.input_length
    rows_per_sample: int = 1
    scored_by: tuple[object, ...] = ()

    def longest(self, data: TokenizedData) -> int:
        """Tokens of the longest row."""
        return max(self.length(data, index) for index in range(len(data)))

    def groups(self, data: TokenizedData, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """`indices` by falling length, ties in their order: trouble with memory shows in the first group."""
        lengths = [self.length(data, index) for index in indices]
        groups: list[list[int]] = []
        room = 0  # samples that still fit the open group
        for place in sorted(range(len(indices)), key=lambda place: -lengths[place]):
            if room == 0:
                groups.append([])
                room = max(1, token_budget // (lengths[place] * self.rows_per_sample))
            groups[-1].append(indices[place])
            room -= 1
        return [tuple(group) for group in groups]


class TrainingSamples:
    """The training data and the order in which steps take it; a `core.protocols.SampleSource`.

    Args:
        data: the tokenized samples.
        layout: how they are put into a batch.
        batch_size: samples of one step.
        seed: keys the order.
    """

    def __init__(self, data: TokenizedData, *, layout: Layout, batch_size: int, seed: int) -> None:
        self.data = data
        self._layout = layout
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

    @property
    def longest(self) -> int:
        """Tokens of the longest row, generated ones included."""
        return self._layout.longest(self.data)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order."""
        return self._layout.collate([self.data[index] for index in indices])

    def length(self, index: int) -> int:
        """Tokens of the longest row of the sample at `index`, generated ones included."""
        return self._layout.length(self.data, index)

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """`indices`, longest first, cut so that rows times longest length stays within `token_budget`.

        A sample longer than the budget is a group of its own.
        """
        return self._layout.groups(self.data, indices, token_budget=token_budget)

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of training step `step`, counted from 0."""
        return self._order.step_indices(step)


class EvaluationSamples:
    """Held-out data, gone through once per evaluation.

    Args:
        data: the tokenized samples.
        layout: how they are put into a batch.
        part: the half of them that is gone through; None: all.
    """

    def __init__(self, data: TokenizedData, *, layout: Layout, part: Part | None = None) -> None:
        self.data = data
        self._layout = layout
        self._part = part
        self.indices: Sequence[int] = range(len(data)) if part is None else part_indices(len(data), part)
        """The samples in `data` that are gone through, ascending."""

    @property
    def num_samples(self) -> int:
        """Number of samples that are gone through."""
        return len(self.indices)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token and label, of what they are scored by, and of which half is meant."""
        part = "" if self._part is None else f" {self._part}"
        return sha256(f"{self.data.fingerprint} {self._layout.scored_by}{part}".encode()).hexdigest()

    def half(self, part: Part) -> "EvaluationSamples":
        """A half of the data."""
        return EvaluationSamples(self.data, layout=self._layout, part=part)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, generated ones included."""
        return self._layout.longest(self.data)

    def batches(self, *, token_budget: int) -> Iterator[Batch]:
        """Every sample once, longest first; rows times longest length stays within `token_budget` where it can."""
        for group in self.groups(token_budget=token_budget):
            yield self._layout.collate([self.data[index] for index in group])

    def groups(self, *, token_budget: int) -> list[tuple[int, ...]]:
        """The samples of each batch, so that their number is known beforehand."""
        return self._layout.groups(self.data, self.indices, token_budget=token_budget)


def load_samples(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Task,
    batch_size: int,
    seed: int,
    position_ids: bool,
    offline: bool,
    metric: MetricObjectiveConfig | None = None,
    answer_tokens: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[TrainingSamples, EvaluationSamples | None]:
    """Reads, formats and tokenizes the data of a run. Only training samples are packed: the mean loss is the same.

    Args:
        position_ids: whether the model's forward pass takes `position_ids`.
        offline: make no network call.
        metric: trained on in place of a loss: training batches then hold what it scores, and every sample weighs 1.
        answer_tokens: of an evaluation that generates answers, the longest.
        stop_requested: asked at every sample.

    Raises:
        DataError: the data is not what the configuration says.
        StopRequested: between two samples.
    """
    data = _tokenize(config, config.train, tokenizer, task=task, offline=offline, stop_requested=stop_requested)
    if config.packing:
        data = pack(data, max_length=config.max_length)
        layout = Layout(partial(collate_packed, pad_token_id=_pad_token_id(tokenizer)))
    elif metric is None:
        layout = _loss_layout(tokenizer, task=task, position_ids=position_ids)
    else:
        layout = _equally_weighted(
            _score_layout(config, tokenizer, task=task, answer_tokens=metric.answer_tokens, position_ids=position_ids)
        )
    training = TrainingSamples(data, layout=layout, batch_size=batch_size, seed=seed)
    if config.evaluation is None:
        return training, None
    evaluation = load_evaluation(
        config,
        config.evaluation,
        tokenizer,
        task=task,
        position_ids=position_ids,
        offline=offline,
        answer_tokens=answer_tokens,
        stop_requested=stop_requested,
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
    answer_tokens: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> EvaluationSamples:
    """Reads, formats and tokenizes `data_set` for evaluation, by the format and length of `config`.

    Args:
        answer_tokens: of generated answers, the longest; None generates none.
        stop_requested: asked at every sample.

    Raises:
        DataError: the data is not what the configuration says.
        StopRequested: between two samples.
    """
    data = _tokenize(config, data_set, tokenizer, task=task, offline=offline, stop_requested=stop_requested)
    layout = _score_layout(config, tokenizer, task=task, answer_tokens=answer_tokens, position_ids=position_ids)
    return EvaluationSamples(data, layout=layout)


def _tokenize(
    config: DataConfig,
    data_set: DataSetConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Task,
    offline: bool,
    stop_requested: Callable[[], bool],
) -> TokenizedData:
    rows = load_rows(data_set, offline=offline)
    if isinstance(config.format, ChatFormat):
        conversations = _until_stopped(read_conversations(rows, config.format), stop_requested)
        return tokenize_conversations(conversations, tokenizer, max_length=config.max_length, place=rows.place)
    if isinstance(config.format, TextFormat):
        documents = _until_stopped(read_documents(rows, config.format), stop_requested)
        return tokenize_documents(
            documents, tokenizer, max_length=config.max_length, split=config.packing, place=rows.place
        )
    examples = _until_stopped(format_rows(rows, config.format), stop_requested)
    if task == "sequence_classification":
        return tokenize_for_classifier(examples, tokenizer, max_length=config.max_length, place=rows.place)
    options = None
    if isinstance(config.format, ClassificationFormat):
        options = tokenize_options(config.format.labels, tokenizer)
    return tokenize_for_language_model(
        examples, tokenizer, max_length=config.max_length, options=options, place=rows.place
    )


def _until_stopped(examples: Iterable[T], stop_requested: Callable[[], bool]) -> Iterator[T]:
    for example in examples:
        if stop_requested():
            raise StopRequested("nothing to save yet: stopped in the preparation of the data")
        yield example


def _loss_layout(tokenizer: "PreTrainedTokenizerBase", *, task: Task, position_ids: bool) -> Layout:
    pad = _pad_token_id(tokenizer)
    if task == "sequence_classification":
        types = "token_type_ids" in tokenizer.model_input_names
        return Layout(partial(collate_for_classifier, pad_token_id=pad, token_type_ids=types))
    return Layout(partial(collate_for_language_model, pad_token_id=pad, position_ids=position_ids))


def _score_layout(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Task,
    answer_tokens: int | None,
    position_ids: bool,
) -> Layout:
    """Of batches for `Objective.evaluate`."""
    if task == "causal_lm" and isinstance(config.format, ClassificationFormat):
        options = tokenize_options(config.format.labels, tokenizer)
        longest = max(len(option) for option in options)
        return Layout(
            partial(collate_options, options=options, pad_token_id=_pad_token_id(tokenizer), position_ids=position_ids),
            length=lambda data, index: data.prompt_length(index) + longest - 1,
            rows_per_sample=len(options) if longest > 1 else 1,
            scored_by=options,
        )
    if answer_tokens is not None:
        return Layout(
            partial(collate_for_generation, pad_token_id=_pad_token_id(tokenizer), position_ids=position_ids),
            length=lambda data, index: max(
                data.input_length(index),
                data.prompt_length(index) + answer_tokens - 1,  # the last one is not read
            ),
            scored_by=("answers", answer_tokens),
        )
    return _loss_layout(tokenizer, task=task, position_ids=position_ids)


def _equally_weighted(layout: Layout) -> Layout:
    """Every sample weighs 1 in the mean loss, whatever it holds."""

    def collate(examples: Sequence[Example]) -> Batch:
        batch = layout.collate(examples)
        return replace(batch, counts=torch.ones_like(batch.counts))

    return replace(layout, collate=collate)


def _pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token; name one as pad_token in its tokenizer_config.json")
    return int(tokenizer.pad_token_id)
