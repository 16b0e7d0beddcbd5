"""What training is about to see of the data, without the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

from vamo_ft.assemble.data import build_samples, mixture_in_words
from vamo_ft.assemble.surroundings import run_length
from vamo_ft.config.data import DataSetConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import VamoFtError
from vamo_ft.data.chat import set_chat_template
from vamo_ft.data.examples import Example, TokenizedData
from vamo_ft.data.places import sample_places
from vamo_ft.data.samples import EvaluationSamples, TrainingSamples
from vamo_ft.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataSummary", "Piece", "Preview", "ShownDocument", "ShownSample", "build_preview"]

_STEPS = 200  # whose padding stands for the epoch's


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one token or of a run of them, and whether it is learnt."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """A document of a sample, as runs of text and token by token."""

    runs: tuple[Piece, ...]
    tokens: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One sample; several documents where they are packed.

    Attributes:
        places: where its rows stand in the data.
        label: its class number, or None.
    """

    index: int
    places: tuple[str, ...]
    documents: tuple[ShownDocument, ...]
    label: int | None
    num_tokens: int
    num_supervised: int


@dataclass(frozen=True, slots=True)
class DataSummary:
    """A data set in figures.

    Attributes:
        lengths: tokens of each sample.
        num_supervised: tokens that are learnt, in all.
        num_truncated: samples that were cut.
        num_skipped: rows that were left out.
        num_documents: documents in all; more than samples where they are packed.
        padding: share of padding in the cells of batches.
    """

    lengths: tuple[int, ...]
    num_supervised: int
    num_truncated: int
    num_skipped: int
    num_documents: int
    padding: float


@dataclass(frozen=True, slots=True)
class Preview:
    """What is shown.

    Attributes:
        samples: those that training takes first.
        mixture: how several data sets make up an epoch; None: there is one.
        samples_per_epoch: that steps draw.
        rows_at_once: samples of a micro-batch, to which training pads.
        num_steps: of the whole run.
    """

    samples: tuple[ShownSample, ...]
    training: DataSummary
    evaluation: DataSummary | None
    mixture: str | None
    samples_per_epoch: int
    batch_size: int
    rows_at_once: int
    num_steps: int


def build_preview(config: RunConfig, *, num_samples: int, use_cache: bool = True) -> Preview:
    """Reads and tokenizes the data as a run would.

    Args:
        use_cache: keep tokens, and take them from where they were kept.

    Raises:
        DataError: tokenizer or data are not what the configuration says.
    """
    tokenizer = load_tokenizer(config.model, offline=config.run.offline)
    set_chat_template(tokenizer, config.data.chat_template)
    source, held_out = build_samples(
        config, tokenizer, position_ids=True, use_cache=use_cache, stop_requested=lambda: False
    )
    size = config.training.micro_batch_size
    rows_at_once = min(size, source.batch_size) if isinstance(size, int) else source.batch_size
    return Preview(
        samples=tuple(
            _shown(source, index, tokenizer, config.data.training_sets) for index in _first_taken(source, num_samples)
        ),
        training=_summary(source.data, _step_groups(source, rows_at_once)),
        evaluation=None if held_out is None else _evaluation_summary(held_out, config.training.forward_batch_tokens),
        mixture=mixture_in_words(source.mixture),
        samples_per_epoch=source.samples_per_epoch,
        batch_size=source.batch_size,
        rows_at_once=rows_at_once,
        num_steps=run_length(config, source),
    )


def _first_taken(source: TrainingSamples, count: int) -> list[int]:
    """The first ones of an epoch, each once; steps are asked for as far as they are needed."""
    taken: dict[int, None] = {}
    for step in range(-(-source.samples_per_epoch // source.batch_size)):
        if len(taken) >= count:
            break
        taken |= dict.fromkeys(source.step_indices(step))
    return list(islice(taken, count))


def _shown(
    source: TrainingSamples, index: int, tokenizer: "PreTrainedTokenizerBase", data_sets: Sequence[DataSetConfig]
) -> ShownSample:
    example = source.data[index]
    ends = example.documents or (len(example.token_ids),)
    origin = source.origin(index)
    try:
        [places] = sample_places(data_sets, [origin])
    except (VamoFtError, OSError):  # not a file whose rows have places
        places = [f"row {row + 1}" for row in origin[1]]
    return ShownSample(
        index,
        tuple(places),
        tuple(_document(example, start, end, tokenizer) for start, end in zip((0, *ends[:-1]), ends, strict=True)),
        example.label,
        len(example.token_ids),
        example.num_supervised,
    )


def _document(example: Example, start: int, end: int, tokenizer: "PreTrainedTokenizerBase") -> ShownDocument:
    places = range(start, end)
    learnt = {place for first, last in example.supervised for place in range(first, last)}
    runs = [
        Piece(_decoded([example.token_ids[place] for place in run], tokenizer), supervised)
        for supervised, run in groupby(places, key=learnt.__contains__)
    ]
    tokens = [Piece(_token_text(example.token_ids[place], tokenizer), place in learnt) for place in places]
    return ShownDocument(tuple(runs), tuple(tokens))


def _decoded(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _token_text(token: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A token's text, or its name where it is a part of a character."""
    text = _decoded([token], tokenizer)
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text


def _step_groups(source: TrainingSamples, rows_at_once: int) -> Iterable[Sequence[int]]:
    for step in range(min(_STEPS, -(-source.samples_per_epoch // source.batch_size))):
        indices = source.step_indices(step)
        yield from (indices[start : start + rows_at_once] for start in range(0, len(indices), rows_at_once))


def _evaluation_summary(samples: EvaluationSamples, token_budget: int) -> DataSummary:
    return _summary(samples.data, samples.groups(token_budget=token_budget))


def _summary(data: TokenizedData, groups: Iterable[Sequence[int]]) -> DataSummary:
    read = cells = 0
    for group in groups:
        lengths = [data.input_length(index) for index in group]
        read += sum(lengths)
        cells += len(lengths) * max(lengths)
    every = range(len(data))
    return DataSummary(
        lengths=tuple(map(data.length, every)),
        num_supervised=sum(map(data.num_supervised, every)),
        num_truncated=data.num_truncated,
        num_skipped=data.num_skipped,
        num_documents=len(data.rows),
        padding=1 - read / max(1, cells),
    )
