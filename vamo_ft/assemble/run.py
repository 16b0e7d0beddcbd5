"""Turns a configuration into a run, ready to start or to go on."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vamo_ft import __version__
from vamo_ft.assemble.directions import build_directions
from vamo_ft.assemble.divergence import check_weights
from vamo_ft.assemble.method import build_estimator, build_update_rule
from vamo_ft.assemble.micro_batch import micro_batch_size
from vamo_ft.assemble.model import build_run_runtime, load_run_model
from vamo_ft.assemble.objective import build_loss, build_objective
from vamo_ft.assemble.restore import remove_seed_log, restore, restored_run_state
from vamo_ft.assemble.seedlog import build_seed_logger
from vamo_ft.assemble.space import check_space
from vamo_ft.assemble.surroundings import RunSurroundings, due, run_length
from vamo_ft.config.compare import meaning_changes
from vamo_ft.config.data import DataSetConfig
from vamo_ft.config.method import SvrgConfig
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Objective, Progress, Runtime, Stateful
from vamo_ft.core.sparse import SparseDirections
from vamo_ft.core.types import Batch, EvaluationTerms
from vamo_ft.data.samples import EvaluationSamples, TrainingSamples, load_evaluation, load_samples
from vamo_ft.models.compilation import compile_layers
from vamo_ft.models.export import save_model, saved_bytes, write_model_card
from vamo_ft.models.fingerprint import base_fingerprint
from vamo_ft.models.loading import LoadedModel, checkpoint_activations
from vamo_ft.models.packing import check_packing
from vamo_ft.objectives.stoppable import StoppableObjective
from vamo_ft.optim.schedules import learning_rate_at
from vamo_ft.training.callbacks import Callback, Checkpointer, Evaluator, MetricsLogger
from vamo_ft.training.checkpoint import Checkpoint, discard_later, save_checkpoint
from vamo_ft.training.continuation import check_base, check_length, check_samples, check_settings, tell_version
from vamo_ft.training.evaluation import EvaluationResult, evaluate
from vamo_ft.training.ledger import Ledger
from vamo_ft.training.matrices import matrix_products
from vamo_ft.training.runtime import memory_errors_explained
from vamo_ft.training.space import SMALL_FILES
from vamo_ft.training.state import RunState
from vamo_ft.training.trainer import Trainer

__all__ = ["Parts", "Run", "build_parts", "build_run", "evaluate_model", "learning_rates"]

_log = logging.getLogger("vamo_ft")

_WATCHED = 8  # samples among which one is chosen


@dataclass(frozen=True, slots=True)
class Run:
    """A run, ready to start or to go on; `rows_of` tells the rows of the training data that a sample comes from."""

    trainer: Trainer
    loaded: LoadedModel
    parameters: TrainableParameters
    evaluator: Evaluator | None
    rows_of: Callable[[int], tuple[int, ...]]

    @property
    def device_name(self) -> str:
        """The device as its maker calls it, or `cpu`."""
        device = self.parameters.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def save_model(self, directory: Path, *, title: str, facts: Mapping[str, str]) -> None:
        """Writes model, tokenizer and model card in a form that loads without this program."""
        save_model(self.loaded.model, self.loaded.tokenizer, directory)
        write_model_card(directory, title=title, facts=facts)


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
    config: RunConfig, *, weights: Path | None, stop_requested: Callable[[], bool] = lambda: False
) -> Parts:
    """Loads model and data; `weights` is a saved `model/` folder that replaces the model's values.

    Raises:
        DataError: model or data are not what the configuration says.
        UsageError: the model has no positions for the longest sample.
        StopRequested: while the data was read.
    """
    runtime = build_run_runtime(config)
    loaded = load_run_model(config, runtime=runtime, weights=weights)
    if config.data.packing:
        check_packing(loaded, path=config.model.path)
    source, held_out = load_samples(
        config.data,
        loaded.tokenizer,
        task=config.model.task,
        batch_size=config.training.batch_size,
        seed=config.run.seed,
        metric=config.objective if isinstance(config.objective, MetricObjectiveConfig) else None,
        answer_tokens=config.evaluation.answer_tokens,
        position_ids=loaded.accepts_position_ids,
        offline=config.run.offline,
        stop_requested=stop_requested,
    )
    if held_out is not None and config.evaluation.part is not None:
        held_out = held_out.half(config.evaluation.part)
    _check_positions(loaded, source, *([] if held_out is None else [held_out]))
    _check_vocabulary(config, loaded, source, *([] if held_out is None else [held_out]))
    _tell_what_is_lost(source)
    objective = build_objective(config, loaded)
    ledger = _build_ledger(config, loaded, source, runtime)
    if config.training.activation_checkpointing:
        checkpoint_activations(loaded.model)
    if config.model.compile:
        compile_layers(loaded.model)
    parameters = TrainableParameters(loaded.model)
    directions = build_directions(config, parameters, loaded.model)
    return Parts(loaded, runtime, source, held_out, objective, parameters, directions, ledger)


def build_run(
    config: RunConfig, surroundings: RunSurroundings, *, checkpoint: Checkpoint | None, allow_changes: bool
) -> Run:
    """Loads model and data, builds everything, and restores `checkpoint` where there is one.

    Args:
        allow_changes: go on from the checkpoint although settings, samples or the base model differ from its own.

    Raises:
        DataError: model or data are not what the configuration, or the checkpoint, says.
        UsageError: the checkpoint belongs to another run, or lies behind this one's end; or the model has no positions
            for the longest sample.
        SaveError: the checkpoints would not fit on the disk.
        StopRequested: while the data was read.
    """
    changes: list[str] = []
    if checkpoint is not None:
        changes = meaning_changes(checkpoint.facts["config"], config.model_dump(mode="json"))
        check_settings(checkpoint, changes, allow=allow_changes)
        changes += check_base(checkpoint, base_fingerprint(config.model), allow=allow_changes)
        tell_version(checkpoint, __version__)
    parts = build_parts(
        config, weights=checkpoint.model_dir if checkpoint else None, stop_requested=surroundings.stop_requested
    )
    loaded, runtime, source, held_out = parts.loaded, parts.runtime, parts.source, parts.held_out
    objective, parameters, directions = parts.objective, parts.parameters, parts.directions
    stoppable = StoppableObjective(objective, surroundings.stop_requested)
    estimator = build_estimator(config, stoppable, parameters, directions, runtime, source, surroundings)
    update_rule = build_update_rule(config, parameters, directions)
    num_steps = run_length(config, source)
    if checkpoint is not None:
        changes += check_samples(checkpoint, source.fingerprint, allow=allow_changes)
        check_length(checkpoint, num_steps, courses=_courses(config))
        discard_later(checkpoint)

    state = restored_run_state(checkpoint) if checkpoint else RunState()
    micro_batch = micro_batch_size(
        config, objective, parameters, directions, runtime, source, chosen=state.micro_batch_size
    )
    state.micro_batch_size = micro_batch if config.training.micro_batch_size == "auto" else None
    metrics = MetricsLogger(
        surroundings.writer,
        due=due(config.logging.every, source),
        num_steps=num_steps,
        ledger=parts.ledger,
        samples_per_epoch=source.num_samples,
    )
    evaluator = (
        None if held_out is None else _build_evaluator(config, objective, held_out, runtime, surroundings, source)
    )
    owners: dict[str, Stateful] = {"estimator": estimator, "update_rule": update_rule, "metrics": metrics}
    if isinstance(directions, SparseDirections):
        owners["directions"] = directions
    if evaluator is not None:
        owners["evaluation"] = evaluator
    seed_logger = build_seed_logger(
        config,
        update_rule,
        parameters,
        directions,
        path=surroundings.seed_log,
        due=due(config.logging.every, source),
        num_steps=num_steps,
        base=loaded.model if checkpoint is None else None,
    )
    if seed_logger is not None:
        owners["seed_log"] = seed_logger
    if checkpoint is not None:
        if changes:
            remove_seed_log(surroundings.seed_log)
        restore(checkpoint, owners, parameters, changes=changes)
    base = base_fingerprint(config.model)
    if base is None and checkpoint is not None:  # with the whole model in the checkpoint it is not needed
        base = checkpoint.facts.get("base")
    model_bytes = saved_bytes(loaded.model) + SMALL_FILES

    def save(state: RunState) -> None:
        check_weights(parameters, source, state)
        with memory_errors_explained(f"saving a checkpoint of step {state.step}"):
            save_checkpoint(
                surroundings.checkpoints,
                step=state.step,
                owners={"run": state.state_dict(), **{name: owner.state_dict() for name, owner in owners.items()}},
                save_model=lambda directory: save_model(loaded.model, loaded.tokenizer, directory),
                facts={
                    "version": __version__,
                    "config": config.model_dump(mode="json"),
                    "data": source.fingerprint,
                    "base": base,
                    "num_steps": num_steps,
                },
                keep=config.checkpoint.keep,
                model_bytes=model_bytes,
                check_held=surroundings.check_held,
            )

    checkpoint_due = due(config.checkpoint.every, source)
    check_space(
        config,
        surroundings.checkpoints,
        owners,
        parameters,
        model_bytes=model_bytes,
        due=checkpoint_due,
        step=state.step,
        num_steps=num_steps,
        num_samples=source.num_samples,
    )
    checkpointer = Checkpointer(
        save,
        due=checkpoint_due,
        num_steps=num_steps,
        saved=restored_run_state(checkpoint) if checkpoint else None,
        evaluated=lambda: None if evaluator is None else evaluator.evaluated,
        at_start=config.training.on_divergence == "rollback",
        tolerant=config.checkpoint.on_error == "continue",
    )
    callbacks: list[Callback] = [metrics, *([] if evaluator is None else [evaluator]), checkpointer]
    if seed_logger is not None:
        callbacks.append(seed_logger)
    trainer = Trainer(
        source=source,
        estimator=estimator,
        update_rule=update_rule,
        learning_rate=learning_rates(config, source),
        num_steps=num_steps,
        micro_batch_size=micro_batch,
        callbacks=callbacks,
        progress=surroundings.progress,
        stop_requested=surroundings.stop_requested,
        state=state,
    )
    return Run(trainer=trainer, loaded=loaded, parameters=parameters, evaluator=evaluator, rows_of=source.data.rows_of)


def evaluate_model(
    config: RunConfig,
    data_set: DataSetConfig,
    *,
    weights: Path,
    progress: Progress,
    stop_requested: Callable[[], bool] = lambda: False,
    observe: Callable[[Batch, EvaluationTerms], None] = lambda batch, terms: None,
) -> EvaluationResult:
    """Loss and scores on `data_set` of the model saved in `weights`; of the configured half, where it is the run's own.

    Args:
        observe: is shown every batch with its samples' losses and scores.

    Raises:
        StopRequested: between two batches.
        DataError: model or data are not what the configuration says.
        UsageError: the model has no positions for the longest sample.
    """
    runtime = build_run_runtime(config)
    loaded = load_run_model(config, runtime=runtime, weights=weights)
    held_out = load_evaluation(
        config.data,
        data_set,
        loaded.tokenizer,
        task=config.model.task,
        answer_tokens=config.evaluation.answer_tokens,
        position_ids=loaded.accepts_position_ids,
        offline=config.run.offline,
    )
    if data_set == config.data.evaluation and config.evaluation.part is not None:
        held_out = held_out.half(config.evaluation.part)
    _check_positions(loaded, held_out)
    _check_vocabulary(config, loaded, held_out)
    return evaluate(
        build_objective(config, loaded),
        held_out,
        runtime,
        token_budget=config.training.forward_batch_tokens,
        progress=progress,
        stop_requested=stop_requested,
        observe=observe,
    )


def _courses(config: RunConfig) -> list[str]:
    """What runs along the whole length of the run."""
    courses = [] if config.schedule.name == "constant" else [f"{config.schedule.name} schedule of the learning rate"]
    if isinstance(config.method, SvrgConfig) and config.method.alpha_decay != "none":
        courses.append(f"{config.method.alpha_decay} decay of method.alpha")
    return courses


def _tell_what_is_lost(source: TrainingSamples) -> None:
    if source.data.num_truncated:
        _log.info("data.max_length cuts %d of %d samples", source.data.num_truncated, len(source.data.rows))
    if source.data.num_skipped:
        _log.info("rows of the training data left out, since nothing in them is learnt: %d", source.data.num_skipped)


def _check_positions(loaded: LoadedModel, *samples: TrainingSamples | EvaluationSamples) -> None:
    longest, limit = max(each.longest for each in samples), loaded.max_positions
    if limit is not None and longest > limit:
        raise UsageError(
            f"data.max_length: samples take up to {longest} tokens, answers to be generated included, and the model "
            f"has positions for {limit}; lower data.max_length (or max_new_tokens)"
        )


def _check_vocabulary(config: RunConfig, loaded: LoadedModel, *samples: TrainingSamples | EvaluationSamples) -> None:
    """A tokenizer may know more tokens than the model, as long as the data needs none of them."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    if len(loaded.tokenizer) <= rows:
        return
    for each in samples:
        if (largest := each.data.largest_token) >= rows:
            raise DataError(
                f"model.path: {config.model.path}: the tokenizer gives token {largest}, and the model has an embedding "
                f"for {rows} tokens; the tokenizer belongs to another model"
            )


def _build_ledger(config: RunConfig, loaded: LoadedModel, source: TrainingSamples, runtime: Runtime) -> Ledger:
    """Prices from one pass over one sample, before anything is recomputed or replaced in the model.

    Supervised tokens are told from the others by their number; of a few samples the one where it differs most serves.
    """
    samples = [source.batch([index]) for index in range(min(_WATCHED, source.num_samples))]
    sample = max(samples, key=lambda batch: batch.num_tokens - batch.num_supervised)
    products = matrix_products(build_loss(config, loaded), sample, runtime=runtime)
    return Ledger.of(products, activation_checkpointing=config.training.activation_checkpointing)


def learning_rates(config: RunConfig, source: TrainingSamples) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0."""
    schedule, peak, num_steps = config.schedule, config.optimizer.learning_rate, run_length(config, source)
    return lambda step: learning_rate_at(
        step, schedule=schedule.name, peak=peak, warmup_steps=schedule.warmup_steps, total_steps=num_steps
    )


def _build_evaluator(
    config: RunConfig,
    objective: Objective,
    held_out: EvaluationSamples,
    runtime: Runtime,
    surroundings: RunSurroundings,
    source: TrainingSamples,
) -> Evaluator:
    def run() -> EvaluationResult:
        return evaluate(
            objective,
            held_out,
            runtime,
            token_budget=config.training.forward_batch_tokens,
            progress=surroundings.progress,
            stop_requested=surroundings.stop_requested,
        )

    return Evaluator(
        run,
        surroundings.writer,
        metrics=config.evaluation.metrics,
        identity=held_out.fingerprint,
        due=due(config.evaluation.every, source),
        num_steps=run_length(config, source),
    )
