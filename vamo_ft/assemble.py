"""The composition root: turns a configuration into the objects of a run. Every choice by name is made here."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vamo_ft import __version__
from vamo_ft.config.compare import meaning_changes
from vamo_ft.config.method import FirstOrderConfig, SpsaConfig, VamoConfig
from vamo_ft.config.period import Period
from vamo_ft.config.schema import ClassificationFormat, DataSetConfig, RunConfig
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import GradientEstimator, Objective, Progress, Runtime, Stateful, UpdateRule
from vamo_ft.core.rounding import share_finer_than_ulp
from vamo_ft.data.samples import EvaluationSamples, TrainingSamples, load_evaluation, load_samples
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.estimators.vamo import Vamo, VamoSettings
from vamo_ft.models.export import save_model, write_model_card
from vamo_ft.models.loading import LoadedModel, load_model
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import SequenceClassification, VerbaliserClassification
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.schedules import learning_rate_at
from vamo_ft.optim.update_rules import DenseRule, build_optimizer
from vamo_ft.training.callbacks import Callback, Checkpointer, Evaluator, MetricsLogger
from vamo_ft.training.checkpoint import Checkpoint, discard_later, save_checkpoint
from vamo_ft.training.continuation import check_length, check_samples, check_settings
from vamo_ft.training.evaluation import EvaluationResult, evaluate
from vamo_ft.training.ledger import Ledger
from vamo_ft.training.runtime import build_runtime
from vamo_ft.training.sinks import MetricsWriter
from vamo_ft.training.state import RunState
from vamo_ft.training.trainer import Trainer

__all__ = ["Run", "Surroundings", "build_run", "evaluate_model"]

_log = logging.getLogger("vamo_ft")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run gets from the process it lives in.

    Attributes:
        checkpoints: folder that checkpoints are written to.
        writer: of metrics.jsonl.
        progress: shows long passes.
        stop_requested: whether a signal came.
    """

    checkpoints: Path
    writer: MetricsWriter
    progress: Progress
    stop_requested: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Run:
    """A run, ready to start or to go on."""

    trainer: Trainer
    loaded: LoadedModel
    parameters: TrainableParameters
    evaluator: Evaluator | None

    @property
    def device_name(self) -> str:
        """The device as its maker calls it, or `cpu`."""
        device = self.parameters.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def save_model(self, directory: Path, *, title: str, facts: Mapping[str, str]) -> None:
        """Writes model, tokenizer and model card in a form that loads without this program."""
        save_model(self.loaded.model, self.loaded.tokenizer, directory)
        write_model_card(directory, title=title, facts=facts)


def _load_model(config: RunConfig, *, runtime: Runtime, weights: Path | None) -> LoadedModel:
    """The model on the runtime's device; `weights` is a saved `model/` folder that replaces its values."""
    labels = config.data.format.labels if isinstance(config.data.format, ClassificationFormat) else {}
    loaded = load_model(
        config.model,
        offline=config.run.offline,
        seed=config.run.seed,
        num_labels=len(labels) if config.model.task == "sequence_classification" else None,
        weights=weights,
    )
    loaded.model.to(runtime.device)
    return loaded


def _build_objective(config: RunConfig, loaded: LoadedModel) -> Objective:
    """The loss that the task and the data format call for."""
    if config.model.task == "sequence_classification":
        return SequenceClassification(loaded.model)
    language_model = CausalLM(loaded.model, accepts_logits_to_keep=loaded.accepts_logits_to_keep)
    if isinstance(config.data.format, ClassificationFormat):
        return VerbaliserClassification(language_model)
    return language_model


def build_run(config: RunConfig, surroundings: Surroundings, *, checkpoint: Checkpoint | None) -> Run:
    """Loads model and data, builds everything, and restores `checkpoint` where there is one.

    Raises:
        DataError: model or data are not what the configuration, or the checkpoint, says.
        UsageError: the checkpoint belongs to another run, or lies behind this one's end.
    """
    if checkpoint is not None:
        check_settings(checkpoint, meaning_changes(checkpoint.facts["config"], config.model_dump(mode="json")))
    runtime = _build_runtime(config)
    loaded = _load_model(config, runtime=runtime, weights=checkpoint.model_dir if checkpoint else None)
    if config.training.activation_checkpointing:
        loaded.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    source, held_out = load_samples(
        config.data,
        loaded.tokenizer,
        task=config.model.task,
        batch_size=config.training.batch_size,
        seed=config.run.seed,
        position_ids=loaded.accepts_position_ids,
        offline=config.run.offline,
    )
    if source.data.num_truncated:
        _log.info("data.max_length cuts the prompt of %d of %d samples", source.data.num_truncated, source.num_samples)
    objective = _build_objective(config, loaded)
    parameters = TrainableParameters(loaded.model)
    directions = _build_directions(config, parameters)
    estimator = _build_estimator(config, objective, parameters, directions, runtime, source, surroundings)
    update_rule = _build_update_rule(config, parameters, directions)
    num_steps = _num_steps(config, source)
    if checkpoint is not None:
        check_samples(checkpoint, source.fingerprint)
        check_length(checkpoint, num_steps, schedule=config.schedule.name)
        discard_later(checkpoint)

    state = RunState.from_state_dict(checkpoint.load("run")) if checkpoint else RunState()
    metrics = MetricsLogger(
        surroundings.writer,
        due=_due(config.logging.every, source),
        num_steps=num_steps,
        ledger=Ledger.of(loaded.model),
        samples_per_epoch=source.num_samples,
    )
    evaluator = (
        None if held_out is None else _build_evaluator(config, objective, held_out, runtime, surroundings, source)
    )
    owners: dict[str, Stateful] = {"estimator": estimator, "update_rule": update_rule, "metrics": metrics}
    if evaluator is not None:
        owners["evaluation"] = evaluator
    if checkpoint is not None:
        for name, owner in owners.items():
            if name != "evaluation" or checkpoint.holds(name):  # held-out data may be new
                owner.load_state_dict(checkpoint.load(name))

    def save(state: RunState) -> None:
        save_checkpoint(
            surroundings.checkpoints,
            step=state.step,
            owners={"run": state.state_dict(), **{name: owner.state_dict() for name, owner in owners.items()}},
            save_model=lambda directory: save_model(loaded.model, loaded.tokenizer, directory),
            facts={
                "version": __version__,
                "config": config.model_dump(mode="json"),
                "data": source.fingerprint,
                "num_steps": num_steps,
            },
            keep=config.checkpoint.keep,
        )

    checkpointer = Checkpointer(
        save,
        due=_due(config.checkpoint.every, source),
        num_steps=num_steps,
        saved=RunState.from_state_dict(checkpoint.load("run")) if checkpoint else None,
    )
    callbacks: list[Callback] = [metrics, *([] if evaluator is None else [evaluator]), checkpointer]
    schedule, peak = config.schedule, config.optimizer.learning_rate
    trainer = Trainer(
        source=source,
        estimator=estimator,
        update_rule=update_rule,
        learning_rate=lambda step: learning_rate_at(
            step, schedule=schedule.name, peak=peak, warmup_steps=schedule.warmup_steps, total_steps=num_steps
        ),
        num_steps=num_steps,
        micro_batch_size=config.training.micro_batch_size or config.training.batch_size,
        callbacks=callbacks,
        progress=surroundings.progress,
        stop_requested=surroundings.stop_requested,
        state=state,
    )
    return Run(trainer=trainer, loaded=loaded, parameters=parameters, evaluator=evaluator)


def evaluate_model(
    config: RunConfig, data_set: DataSetConfig, *, weights: Path, progress: Progress
) -> EvaluationResult:
    """Loss and accuracy on `data_set` of the model saved in `weights`.

    Raises:
        DataError: model or data are not what the configuration says.
    """
    runtime = _build_runtime(config)
    loaded = _load_model(config, runtime=runtime, weights=weights)
    held_out = load_evaluation(
        config.data,
        data_set,
        loaded.tokenizer,
        task=config.model.task,
        position_ids=loaded.accepts_position_ids,
        offline=config.run.offline,
    )
    return evaluate(
        _build_objective(config, loaded),
        held_out,
        runtime,
        token_budget=config.training.forward_batch_tokens,
        progress=progress,
        stop_requested=lambda: False,
    )


def _build_runtime(config: RunConfig) -> Runtime:
    return build_runtime(autocast=torch.bfloat16 if config.training.autocast else None)


def _num_steps(config: RunConfig, source: TrainingSamples) -> int:
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, math.ceil(training.epochs * source.num_samples / training.batch_size))


def _due(every: Period | None, source: TrainingSamples) -> Callable[[int], bool]:
    if every is None:
        return lambda step: False
    return lambda step: every.due(step, batch_size=source.batch_size, num_samples=source.num_samples)


def _build_directions(config: RunConfig, parameters: TrainableParameters) -> HashedDirections | None:
    match config.method:
        case SpsaConfig() | VamoConfig():
            match config.method.directions.structure:
                case "full":
                    return HashedDirections(parameters, distribution=config.method.directions.distribution)
        case FirstOrderConfig():
            return None


def _build_estimator(
    config: RunConfig,
    objective: Objective,
    parameters: TrainableParameters,
    directions: HashedDirections | None,
    runtime: Runtime,
    source: TrainingSamples,
    surroundings: Surroundings,
) -> GradientEstimator:
    method, seed = config.method, config.run.seed
    first_order = FirstOrder(objective, parameters, runtime, seed=seed)
    match method:
        case FirstOrderConfig():
            return first_order
        case SpsaConfig():
            assert directions is not None
            _warn_of_small_eps(method.eps, parameters)
            return Spsa(
                LossProbe(objective, parameters, directions, runtime),
                runtime,
                num_probes=method.probes,
                eps=method.eps,
                difference=method.difference,
                seed=seed,
            )
        case VamoConfig():
            assert directions is not None
            if method.probes > directions.numel:
                raise UsageError(f"method.probes: {method.probes} exceeds the {directions.numel} trainable parameters")
            if method.eps != "auto":
                _warn_of_small_eps(method.eps, parameters)
            snapshot = method.snapshot
            settings = VamoSettings(
                num_probes=method.probes,
                eps=None if method.eps == "auto" else method.eps,
                alpha=method.alpha,
                difference=method.difference,
                snapshot_due=_due(snapshot.every, source),
                subset=None if snapshot.set == "all" else snapshot.set.subset,
                horizon=snapshot.every.count,
                source=method.source,
                orthogonalise=method.orthogonalise,
                normaliser=method.normaliser,
                token_budget=config.training.forward_batch_tokens,
                seed=seed,
            )
            return Vamo(
                first_order,
                objective,
                parameters,
                directions,
                runtime,
                settings=settings,
                progress=surroundings.progress,
                stop_requested=surroundings.stop_requested,
            )


def _warn_of_small_eps(eps: float, parameters: TrainableParameters) -> None:
    if (share := share_finer_than_ulp(parameters.tensors, eps)) > 0.05:
        _log.warning(
            "method.eps: %g is below the spacing of representable values of %.0f %% of the weights; probe points are "
            "rounded at random there, which adds noise: take a larger eps, or model.dtype: float32",
            eps,
            100 * share,
        )


def _build_update_rule(
    config: RunConfig, parameters: TrainableParameters, directions: HashedDirections | None
) -> UpdateRule:
    optimizer, max_grad_norm = config.optimizer, config.training.max_grad_norm
    if isinstance(config.method, SpsaConfig) and optimizer.name == "sgd" and optimizer.momentum == 0:
        assert directions is not None
        return ProjectedSgd(
            parameters,
            directions,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=max_grad_norm,
            seed=config.run.seed,
        )
    rule = build_optimizer(
        parameters,
        name=optimizer.name,
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        betas=optimizer.betas,
        eps=optimizer.eps,
    )
    return DenseRule(parameters, directions, rule, max_grad_norm=max_grad_norm)


def _build_evaluator(
    config: RunConfig,
    objective: Objective,
    held_out: EvaluationSamples,
    runtime: Runtime,
    surroundings: Surroundings,
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
        due=_due(config.evaluation.every, source),
        num_steps=_num_steps(config, source),
    )
