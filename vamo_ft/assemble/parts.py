"""Model, data, objective and directions of a run: what its method works on."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vamo_ft.assemble.data import build_samples, tell_mixture
from vamo_ft.assemble.directions import build_directions
from vamo_ft.assemble.method import check_optimizer
from vamo_ft.assemble.model import build_run_runtime, load_run_model
from vamo_ft.assemble.objective import build_loss, build_objective
from vamo_ft.assemble.stored import as_stored
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Objective, Runtime
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.streaming import LayerStream
from vamo_ft.data.chat import set_chat_template
from vamo_ft.data.samples import EvaluationSamples, TrainingSamples
from vamo_ft.models.compilation import compile_layers
from vamo_ft.models.loading import LoadedModel, checkpoint_activations, load_outline
from vamo_ft.models.packing import check_packing
from vamo_ft.models.padding import check_padding
from vamo_ft.training.ledger import Ledger
from vamo_ft.training.matrices import matrix_products
from vamo_ft.training.processes import Processes
from vamo_ft.training.runtime import AcceleratedRuntime, ShardedRuntime

__all__ = ["Parts", "build_outline", "build_parts", "check_positions", "check_vocabulary"]

_log = logging.getLogger("vamo_ft")

_WATCHED = 8  # samples among which one is chosen


@dataclass(frozen=True, slots=True)
class Parts:
    """What a method works on."""

    loaded: LoadedModel
    runtime: Runtime
    source: TrainingSamples
    held_out: EvaluationSamples | None
    objective: Objective
    parameters: TrainableParameters
    directions: Directions | None
    ledger: Ledger


def build_parts(
    config: RunConfig,
    *,
    weights: Path | None,
    use_cache: bool = True,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Parts:
    """Loads model and data; `weights` is a saved `model/` folder that replaces the model's values.

    Args:
        use_cache: keep tokens, and take them from where they were kept.

    Raises:
        DataError: model or data are not what the configuration says.
        UsageError: the model has no positions for the longest sample, or the optimizer cannot be had here.
        StopRequested: while the data was read.
    """
    check_optimizer(config)
    runtime = build_run_runtime(config)
    loaded = load_run_model(config, runtime=runtime, weights=weights)
    if config.model.task == "causal_lm":
        with runtime.autocast():
            check_padding(loaded, path=config.model.path)
    if config.data.packing:
        check_packing(loaded, path=config.model.path)
    parts = _undirected(config, loaded, runtime, use_cache=use_cache, stop_requested=stop_requested)
    if config.model.compile:
        compile_layers(loaded.model)
    return replace(parts, directions=build_directions(config, parts.parameters, loaded.model))


def build_outline(config: RunConfig, *, use_cache: bool = True, processes: Processes | None = None) -> Parts:
    """The same without values in the model (see `core.allocations`) and without directions; no weights are read.

    Args:
        use_cache: keep tokens, and take them from where they were kept.
        processes: that share the run out; None: one.

    Raises:
        DataError: model or data are not what the configuration says.
        UsageError: the model has no positions for the longest sample.
    """
    loaded = load_outline(config.model, offline=config.run.offline, num_labels=config.num_labels)
    config = as_stored(config, loaded.four_bits)
    set_chat_template(loaded.tokenizer, config.data.chat_template)
    runtime: Runtime
    runtime = local = LocalRuntime(autocast=torch.bfloat16 if config.training.autocast else None)
    if processes is not None:
        runtime = (ShardedRuntime if config.training.fsdp else AcceleratedRuntime)(processes, local)
    return _undirected(config, loaded, runtime, use_cache=use_cache, stop_requested=lambda: False, placed=False)


def _undirected(
    config: RunConfig,
    loaded: LoadedModel,
    runtime: Runtime,
    *,
    use_cache: bool,
    stop_requested: Callable[[], bool],
    placed: bool = True,
) -> Parts:
    """All but the directions; of a model that is not `placed` yet, processes get their parts."""
    if use_cache and not runtime.is_main:
        runtime.any(False)  # the main process reads the data first, for the cache of all
    source, held_out = build_samples(
        config,
        loaded.tokenizer,
        position_ids=loaded.accepts_position_ids,
        use_cache=use_cache,
        stop_requested=stop_requested,
    )
    if use_cache and runtime.is_main:
        runtime.any(False)
    if held_out is not None and config.evaluation.part is not None:
        held_out = held_out.half(config.evaluation.part)
    tell_mixture(source.mixture)
    check_positions(loaded, source, *([] if held_out is None else [held_out]))
    check_vocabulary(config, loaded, source, *([] if held_out is None else [held_out]))
    _tell_what_is_lost(source)
    objective = build_objective(config, loaded)
    if loaded.stream is not None:
        _check_stream(loaded.stream, build_loss(config, loaded), source, runtime)
    ledger = _build_ledger(config, loaded, source, runtime)
    if not placed and runtime.share[1] > 1:  # outlines are not put together in a pass that nobody follows
        runtime.place(loaded.root)
    if config.training.activation_checkpointing:
        checkpoint_activations(loaded.model)
    parameters = TrainableParameters(loaded.model, runtime, stream=loaded.stream)
    return Parts(loaded, runtime, source, held_out, objective, parameters, None, ledger)


def _tell_what_is_lost(source: TrainingSamples) -> None:
    if source.data.num_truncated:
        _log.info("data.max_length cuts %d of %d samples", source.data.num_truncated, len(source.data.rows))
    if source.data.num_skipped:
        _log.info("rows of the training data left out, since nothing in them is learnt: %d", source.data.num_skipped)


def check_positions(loaded: LoadedModel, *samples: TrainingSamples | EvaluationSamples) -> None:
    """A model has positions for so many tokens.

    Raises:
        UsageError: a sample is longer.
    """
    longest, limit = max(each.longest for each in samples), loaded.max_positions
    if limit is not None and longest > limit:
        raise UsageError(
            f"data.max_length: samples take up to {longest} tokens, answers to be generated included, and the model "
            f"has positions for {limit}; lower data.max_length (or max_new_tokens)"
        )


def check_vocabulary(config: RunConfig, loaded: LoadedModel, *samples: TrainingSamples | EvaluationSamples) -> None:
    """A tokenizer may know more tokens than the model, as long as the data needs none of them.

    Raises:
        DataError: it needs one.
    """
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    if len(loaded.tokenizer) <= rows:
        return
    for each in samples:
        if (largest := each.data.largest_token) >= rows:
            raise DataError(
                f"model.path: {config.model.path}: the tokenizer gives token {largest}, and the model has an embedding "
                f"for {rows} tokens; the tokenizer belongs to another model"
            )


def _check_stream(stream: LayerStream, objective: Objective, source: TrainingSamples, runtime: Runtime) -> None:
    batch = source.batch([0]).to(runtime.device)

    def losses() -> Tensor:
        objective.module.eval()
        with runtime.autocast():
            return objective.terms(batch).total

    stream.check(losses)


def _build_ledger(config: RunConfig, loaded: LoadedModel, source: TrainingSamples, runtime: Runtime) -> Ledger:
    """Prices from one pass over one sample, before anything is recomputed or replaced in the model.

    Supervised tokens are told from the others by their number; of a few samples the one where it differs most serves.
    """
    samples = [source.batch([index]) for index in range(min(_WATCHED, source.num_samples))]
    sample = max(samples, key=lambda batch: batch.num_tokens - batch.num_supervised)
    products = matrix_products(build_loss(config, loaded), sample, runtime=runtime)
    return Ledger.of(products, activation_checkpointing=config.training.activation_checkpointing)
