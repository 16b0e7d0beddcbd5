"""From the `data` section to the samples of a run."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from vamo_ft.config.data import ChatFormat, DataConfig, DataSetConfig, TextFormat
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.config.tasks import TaskFormat
from vamo_ft.core.errors import DataError
from vamo_ft.core.types import Batch
from vamo_ft.data.cache import TokenCache
from vamo_ft.data.chat import tokenize_conversations
from vamo_ft.data.collation import (
    collate_for_classifier,
    collate_for_generation,
    collate_for_language_model,
    collate_options,
    collate_own_options,
    collate_packed,
)
from vamo_ft.data.conversations import read_conversations
from vamo_ft.data.examples import Example, TokenizedData, concatenated
from vamo_ft.data.formatting import format_rows, option_texts, read_documents
from vamo_ft.data.mixture import Mixture
from vamo_ft.data.packing import pack
from vamo_ft.data.rows import Rows
from vamo_ft.data.samples import EvaluationSamples, Layout, TrainingSamples
from vamo_ft.data.sampling import load_sampled_rows
from vamo_ft.data.shots import draw_demonstrations
from vamo_ft.data.stopping import until_stopped
from vamo_ft.data.text import tokenize_documents
from vamo_ft.data.tokenization import (
    tokenize_for_classifier,
    tokenize_for_language_model,
    tokenize_options,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Task", "load_evaluation", "load_samples"]

Task = Literal["causal_lm", "sequence_classification"]


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
    cache: TokenCache | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[TrainingSamples, EvaluationSamples | None]:
    """Reads, formats and tokenizes the data of a run. Only training samples are packed: the mean loss is the same.

    Args:
        position_ids: whether the model's forward pass takes `position_ids`.
        offline: make no network call.
        metric: trained on in place of a loss: training batches then hold what it scores, and every sample weighs 1.
        answer_tokens: of an evaluation that generates answers, the longest.
        cache: of tokens; None makes them anew.
        stop_requested: asked at every sample.

    Raises:
        DataError: the data is not what the configuration says.
        StopRequested: between two samples.
    """
    parts = [
        _tokenize(config, each, tokenizer, task=task, offline=offline, cache=cache, stop_requested=stop_requested)
        for each in config.training_sets
    ]
    if config.packing:
        parts = [pack(part, max_length=config.max_length) for part in parts]
        layout = Layout(partial(collate_packed, pad_token_id=_pad_token_id(tokenizer)))
    elif metric is None:
        layout = _loss_layout(tokenizer, task=task, position_ids=position_ids)
    else:
        layout = _equally_weighted(
            _score_layout(config, tokenizer, task=task, answer_tokens=metric.answer_tokens, position_ids=position_ids)
        )
    mixture = Mixture(tuple(map(len, parts)), config.weights)
    training = TrainingSamples(concatenated(parts), layout=layout, batch_size=batch_size, seed=seed, mixture=mixture)
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
        cache=cache,
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
    cache: TokenCache | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> EvaluationSamples:
    """Reads, formats and tokenizes `data_set` for evaluation, by the format and length of `config`.

    Args:
        answer_tokens: of generated answers, the longest; None generates none.
        cache: of tokens; None makes them anew.
        stop_requested: asked at every sample.

    Raises:
        DataError: the data is not what the configuration says.
        StopRequested: between two samples.
    """
    data = _tokenize(
        config, data_set, tokenizer, task=task, offline=offline, cache=cache, stop_requested=stop_requested
    )
    config = config.of(data_set)
    layout = _score_layout(config, tokenizer, task=task, answer_tokens=answer_tokens, position_ids=position_ids)
    return EvaluationSamples(data, layout=layout)


def _tokenize(
    config: DataConfig,
    data_set: DataSetConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Task,
    offline: bool,
    cache: TokenCache | None,
    stop_requested: Callable[[], bool],
) -> TokenizedData:
    key, format = config.format_key(data_set), config.of(data_set).format
    rows = load_sampled_rows(data_set, format, offline=offline, stop_requested=stop_requested)
    shown = _rows_to_show(config, data_set, rows, offline=offline, stop_requested=stop_requested)
    config = config.of(data_set)
    tokenize = partial(
        _tokenize_rows, config, rows, shown, tokenizer, task=task, key=key, stop_requested=stop_requested
    )
    if cache is None:
        data = tokenize()
    else:
        made_of = {
            "rows": rows.content_hash(stop_requested),
            "shown": None if shown is None else shown.content_hash(stop_requested),
            "data_set": data_set.model_dump(mode="json", exclude={"path", "weight"}),
            "settings": config.model_dump(mode="json", exclude={"train", "evaluation"}),
            "task": task,
        }
        data = cache.data(made_of, tokenize)
    numbers = rows.numbers
    return data if numbers is None else replace(data, rows=array("q", (numbers[row] for row in data.rows)))


def _rows_to_show(
    config: DataConfig, data_set: DataSetConfig, rows: Rows, *, offline: bool, stop_requested: Callable[[], bool]
) -> Rows | None:
    """The rows of the first training set of the task, from which solved examples are drawn; None where none are shown.

    Args:
        rows: of `data_set`.
    """
    written = config.of(data_set).format
    if not isinstance(written, TaskFormat) or written.shots == 0:
        return None
    for each in config.training_sets:
        own = config.of(each).format
        if isinstance(own, TaskFormat) and own.name == written.name:
            if each == data_set:
                return rows
            return load_sampled_rows(each, written, offline=offline, stop_requested=stop_requested)
    raise DataError(
        f"{config.format_key(data_set)}.shots: no data set of data.train is of the task {written.name}, to draw "
        "examples from"
    )


def _tokenize_rows(
    config: DataConfig,
    rows: Rows,
    shown: Rows | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Task,
    key: str,
    stop_requested: Callable[[], bool],
) -> TokenizedData:
    written, place = config.format, rows.place if rows.numbers is None else f"{rows.place}, sampled"
    if isinstance(written, ChatFormat):
        conversations = until_stopped(read_conversations(rows, written, key=key), stop_requested)
        return tokenize_conversations(conversations, tokenizer, max_length=config.max_length, place=place)
    if isinstance(written, TextFormat):
        documents = until_stopped(read_documents(rows, written, key=key), stop_requested)
        return tokenize_documents(documents, tokenizer, max_length=config.max_length, split=config.packing, place=place)
    demonstrations = None
    if shown is not None:
        assert isinstance(written, TaskFormat)
        demonstrations = draw_demonstrations(shown, written, key=key)
    examples = until_stopped(format_rows(rows, written, demonstrations=demonstrations, key=key), stop_requested)
    if task == "sequence_classification":
        return tokenize_for_classifier(examples, tokenizer, max_length=config.max_length, place=place)
    texts = option_texts(written)
    options = tokenize_options(texts, tokenizer, key=key) if texts else None
    return tokenize_for_language_model(examples, tokenizer, max_length=config.max_length, options=options, place=place)


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
    if task == "causal_lm" and (texts := option_texts(config.format)):
        options = tokenize_options(texts, tokenizer)
        longest = max(len(option) for option in options)
        return Layout(
            partial(collate_options, options=options, pad_token_id=_pad_token_id(tokenizer), position_ids=position_ids),
            length=lambda data, index: data.prompt_length(index) + longest - 1,
            num_rows=lambda data, index: len(options) if longest > 1 else 1,
            scored_by=options,
        )
    if task == "causal_lm" and "accuracy" in config.format.metrics:
        return Layout(
            partial(collate_own_options, pad_token_id=_pad_token_id(tokenizer), position_ids=position_ids),
            length=lambda data, index: data.prompt_length(index) + max(map(len, data.options[index])) - 1,
            num_rows=lambda data, index: len(data.options[index]),
            scored_by=("own options",),
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
