"""Turns a configuration into a run, ready to start or to go on."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vamo_ft import __version__
from vamo_ft.assemble.divergence import check_weights
from vamo_ft.assemble.evaluator import Verdicts, build_evaluator
from vamo_ft.assemble.method import build_estimator, build_update_rule
from vamo_ft.assemble.micro_batch import micro_batch_size
from vamo_ft.assemble.parts import build_parts
from vamo_ft.assemble.restore import remove_seed_log, restore, restored_run_state
from vamo_ft.assemble.seedlog import build_seed_logger
from vamo_ft.assemble.space import check_space
from vamo_ft.assemble.surroundings import (
    RunSurroundings,
    checkpoint_may_be_due,
    due,
    run_length,
    training_line_due,
)
from vamo_ft.config.compare import meaning_changes
from vamo_ft.config.method import SvrgConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Runtime, Stateful
from vamo_ft.core.sparse import SparseDirections
from vamo_ft.data.mixture import Origin
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.models.card import Card, write_model_card
from vamo_ft.models.export import gathered, save_model, saved_bytes
from vamo_ft.models.fingerprint import base_fingerprint
from vamo_ft.models.loading import LoadedModel
from vamo_ft.objectives.stoppable import StoppableObjective
from vamo_ft.optim.schedules import learning_rate_at
from vamo_ft.training.callbacks import Callback, Checkpointer, Evaluator, MetricsLogger
from vamo_ft.training.checkpoint import Checkpoint, discard_later, save_checkpoint
from vamo_ft.training.continuation import check_base, check_length, check_samples, check_settings, tell_version
from vamo_ft.training.processes import lost_processes_explained
from vamo_ft.training.replicas import ReplicaCheck, check_alike
from vamo_ft.training.runtime import memory_errors_explained
from vamo_ft.training.shared_saving import save_together
from vamo_ft.training.space import SMALL_FILES
from vamo_ft.training.state import RunState
from vamo_ft.training.trainer import Trainer

__all__ = ["Run", "build_run", "learning_rates"]

_log = logging.getLogger("vamo_ft")


@dataclass(frozen=True, slots=True)
class Run:
    """A run, ready to start or to go on; `origin` tells the rows of the training data that a sample comes from."""

    trainer: Trainer
    loaded: LoadedModel
    parameters: TrainableParameters
    runtime: Runtime
    evaluator: Evaluator | None
    origin: Callable[[int], Origin]

    @property
    def device_name(self) -> str:
        """The device as its maker calls it, or `cpu`."""
        device = self.parameters.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def save_model(self, directory: Path, *, card: Card, saved: Path | None = None) -> None:
        """Writes model, tokenizer and model card in a form that loads without this program.

        Args:
            saved: a folder with the model of another step, whose files are taken; None: the run's model as it is.
        """
        if saved is None:
            self.parameters.settle()
            save_model(self.loaded.model, self.loaded.tokenizer, directory)
        else:
            shutil.copytree(saved, directory)
        write_model_card(directory, card)


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
        config,
        weights=checkpoint.model_dir if checkpoint else None,
        use_cache=surroundings.use_cache,
        stop_requested=surroundings.stop_requested,
    )
    loaded, runtime, source, held_out = parts.loaded, parts.runtime, parts.source, parts.held_out
    objective, parameters, directions = parts.objective, parts.parameters, parts.directions
    base = base_fingerprint(config.model)  # now that the model is known to be readable
    evaluation = None if held_out is None else held_out.fingerprint
    check_alike(runtime, {"model.path": base, "data.train": source.fingerprint, "data.evaluation": evaluation})
    alone_asks = surroundings.stop_requested
    stoppable = StoppableObjective(objective, runtime.within_step(alone_asks))
    surroundings = replace(surroundings, stop_requested=lambda: runtime.any(alone_asks()))
    estimator = build_estimator(config, stoppable, parameters, directions, runtime, source, surroundings)
    update_rule = build_update_rule(config, parameters, directions)
    num_steps = run_length(config, source)
    if checkpoint is not None:
        checkpoint = replace(checkpoint, share=runtime.share)
        changes += check_samples(checkpoint, source.fingerprint, allow=allow_changes)
        check_length(checkpoint, num_steps, courses=_courses(config))
        if runtime.is_main:
            surroundings.check_held()
            discard_later(checkpoint)

    state = restored_run_state(checkpoint) if checkpoint else RunState()
    micro_batch = micro_batch_size(
        config, objective, parameters, directions, runtime, source, chosen=state.micro_batch_size
    )
    state.micro_batch_size = micro_batch if config.training.micro_batch_size == "auto" else None
    metrics = MetricsLogger(
        surroundings.writer,
        due=training_line_due(config, source),
        num_steps=num_steps,
        ledger=parts.ledger,
        samples_per_epoch=source.samples_per_epoch,
    )
    evaluator = (
        None if held_out is None else build_evaluator(config, objective, held_out, runtime, surroundings, source)
    )
    verdicts = Verdicts(evaluator)
    owners: dict[str, Stateful] = {"estimator": estimator, "update_rule": update_rule, "metrics": metrics}
    if isinstance(directions, SparseDirections):
        owners["directions"] = directions
    if evaluator is not None:
        owners["evaluation"] = evaluator
    seed_logger = (
        build_seed_logger(
            config,
            update_rule,
            parameters,
            directions,
            path=surroundings.seed_log,
            due=due(config.logging.every, source),
            num_steps=num_steps,
            ends_early=verdicts.ends_early,
            base=loaded.model if checkpoint is None else None,
        )
        if runtime.is_main
        else None
    )
    if seed_logger is not None:
        owners["seed_log"] = seed_logger
    elif runtime.is_main and parameters.sharded:
        remove_seed_log(surroundings.seed_log, reason="processes that share the model out do not go on with it")
    if checkpoint is not None:
        if changes and runtime.is_main:
            remove_seed_log(surroundings.seed_log, reason="with other settings it could not rebuild the run")
        restore(checkpoint, owners, parameters, changes=changes)
    if base is None and checkpoint is not None:  # with the whole model in the checkpoint it is not needed
        base = checkpoint.facts.get("base")
    model_bytes = saved_bytes(loaded.model) + SMALL_FILES
    replica_check = None
    if config.training.check_processes_every is not None:
        replica_check = ReplicaCheck(parameters, runtime, due=due(config.training.check_processes_every, source))

    def save(state: RunState) -> None:
        if replica_check is not None:
            replica_check.compare(state)
        check_weights(parameters, source, state)
        with memory_errors_explained(f"saving a checkpoint of step {state.step}"), lost_processes_explained():
            weights = gathered(loaded.model, keep=runtime.is_main) if parameters.sharded else None
            states = {"run": state.state_dict(), **{name: owner.state_dict() for name, owner in owners.items()}}
            save_together(
                runtime,
                states,
                lambda write_others: save_checkpoint(
                    surroundings.checkpoints,
                    step=state.step,
                    owners=states,
                    save_model=lambda directory: save_model(loaded.model, loaded.tokenizer, directory, weights=weights),
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
                    best_step=verdicts.best_step,
                    write_others=write_others,
                    processes=runtime.share[1],
                ),
            )

    checkpoint_due = due(config.checkpoint.every, source)
    if runtime.is_main:
        check_space(
            config,
            surroundings.checkpoints,
            owners,
            parameters,
            model_bytes=model_bytes,
            due=checkpoint_may_be_due(config, source),
            step=state.step,
            num_steps=num_steps,
            num_samples=source.num_samples,
        )
    runtime.any(False)  # nobody trains, and replaces checkpoints, while another process still reads one

    def save_due(step: int) -> bool:
        return checkpoint_due(step) or verdicts.is_best(step)

    checkpointer = Checkpointer(
        save,
        due=save_due,
        num_steps=num_steps,
        saved=restored_run_state(checkpoint) if checkpoint else None,
        evaluated=lambda: None if evaluator is None else evaluator.evaluated,
        at_start=config.training.on_divergence == "rollback",
        tolerant=config.checkpoint.on_error == "continue",
        ends_early=verdicts.ends_early,
    )
    callbacks: list[Callback] = [metrics, *([] if evaluator is None else [evaluator])]
    if replica_check is not None:
        callbacks.append(replica_check)
    callbacks.append(checkpointer)
    if seed_logger is not None:
        callbacks.append(seed_logger)
    trainer = Trainer(
        source=source,
        estimator=estimator,
        update_rule=update_rule,
        learning_rate=learning_rates(config, source),
        num_steps=num_steps,
        micro_batch_size=runtime.evenly(source.batch_size, at_most=micro_batch),
        callbacks=callbacks,
        progress=surroundings.progress,
        stop_requested=surroundings.stop_requested,
        state=state,
        ends_early=verdicts.ends_early,
    )
    return Run(
        trainer=trainer,
        loaded=loaded,
        parameters=parameters,
        runtime=runtime,
        evaluator=evaluator,
        origin=source.origin,
    )


def _courses(config: RunConfig) -> list[str]:
    """What runs along the whole length of the run."""
    courses = [] if config.schedule.name == "constant" else [f"{config.schedule.name} schedule of the learning rate"]
    if isinstance(config.method, SvrgConfig) and config.method.alpha_decay != "none":
        courses.append(f"{config.method.alpha_decay} decay of method.alpha")
    return courses


def learning_rates(config: RunConfig, source: TrainingSamples) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0."""
    schedule, peak, num_steps = config.schedule, config.optimizer.learning_rate, run_length(config, source)
    return lambda step: learning_rate_at(
        step, schedule=schedule.name, peak=peak, warmup_steps=schedule.warmup_steps, total_steps=num_steps
    )
