"""The seed log of a run, and the model that is rebuilt from it."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vamo_ft.assemble.directions import build_directions
from vamo_ft.assemble.method import build_update_rule
from vamo_ft.assemble.model import build_run_runtime, load_run_model
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.blocks import BlockDirections
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.core.factored import FactoredDirections
from vamo_ft.core.parameters import TrainableParameters, frozen_digest
from vamo_ft.core.protocols import Directions, Progress, UpdateRule
from vamo_ft.models.loading import LoadedModel
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.training.seedlog import SeedLog, SeedLogger, read_seed_log

__all__ = ["build_seed_logger", "replay_seed_log"]

_log = logging.getLogger("vamo_ft")


def build_seed_logger(
    config: RunConfig,
    update_rule: UpdateRule,
    parameters: TrainableParameters,
    directions: Directions | None,
    *,
    path: Path,
    due: Callable[[int], bool],
    num_steps: int,
    ends_early: Callable[[int], bool],
    base: nn.Module | None,
) -> SeedLogger | None:
    """The writer of the log where coefficients, keys and the first weights determine all weights; else None.

    That is plain SGD along directions that nothing but their keys (and for sparse ones the weights) decides, of a model
    that processes do not share out.

    Args:
        base: the model before its first step, for a log that begins; None for one that goes on.
    """
    pure = isinstance(directions, HashedDirections | BlockDirections | FactoredDirections)
    if not isinstance(update_rule, ProjectedSgd) or not pure or parameters.sharded:  # no process could hash the whole
        if base is not None:
            path.unlink(missing_ok=True)  # of an attempt with another method, before its first checkpoint
        return None
    logger = SeedLogger(
        path,
        seed=config.run.seed,
        applied=lambda: update_rule.applied,
        digest=parameters.digest,
        due=due,
        num_steps=num_steps,
        ends_early=ends_early,
    )
    if base is not None:
        logger.begin({"settings": _settings(config), "base": _fingerprint(parameters, base)})
    return logger


def replay_seed_log(
    config: RunConfig, path: Path, *, base: str, steps: int | None, progress: Progress
) -> tuple[LoadedModel, int]:
    """The model after a run, or after its first steps: loads `base` and makes the updates of the log again.

    Reads neither checkpoints nor the run's model. The weights are those of the run bit for bit on a device of the same
    type, which is checked against the hash at the log's end.

    Args:
        config: of the run.
        path: the seed log.
        base: path or Hub id of the model that the run began with.
        steps: steps to make again; None: all of a log that is complete.

    Returns:
        The model, and the number of steps.

    Raises:
        DataError: the log is damaged before its end, or belongs to another configuration or base model.
        UsageError: it has fewer than `steps` steps.
    """
    log = read_seed_log(path)
    num_steps = _num_steps(log, path, steps=steps)
    settings = {**_settings(config), "seed": config.run.seed}
    logged = {**log.header["settings"], "seed": log.header["seed"]}
    if settings != logged:
        names = sorted(name for name in settings.keys() | logged if settings.get(name) != logged.get(name))
        raise DataError(f"{path}: belongs to a run with another {' and '.join(names)} than config.yaml beside it")
    runtime = build_run_runtime(config)
    model = config.model.model_copy(update={"path": base})
    loaded = load_run_model(config.model_copy(update={"model": model}), runtime=runtime, weights=None)
    parameters = TrainableParameters(loaded.model, stream=loaded.stream)
    _check_base(log.header["base"], _fingerprint(parameters, loaded.model), path=path, base=base)
    rule = build_update_rule(config, parameters, build_directions(config, parameters, loaded.model))
    if not isinstance(rule, ProjectedSgd):
        raise DataError(f"{path}: belongs to a run with plain sgd, and config.yaml beside it has another optimizer")
    updates = [update for update in log.updates if update.step < num_steps]
    with progress.task("replay", len(updates)) as task:
        for update in updates:
            rule.replay(update)
            task.advance()
    if num_steps == log.num_steps and log.final_digest is not None:
        _compare(parameters, log, path=path)
    if loaded.stream is not None:
        loaded.stream.end()
    return replace(loaded, stream=None), num_steps


def _settings(config: RunConfig) -> dict[str, Any]:
    """What decides where an update leads, besides its record and the seed."""
    return {
        "directions": config.method.model_dump(mode="json").get("directions"),
        "weight_decay": config.optimizer.weight_decay,
        "master_weights": config.optimizer.master_weights,
    }


def _fingerprint(parameters: TrainableParameters, module: nn.Module) -> dict[str, str]:
    shapes = [
        f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in zip(parameters.names, parameters.tensors, strict=True)
    ]
    return {
        "shapes": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "trained": parameters.digest(),
        "frozen": frozen_digest(module),
        "device": parameters.device.type,
    }


def _num_steps(log: SeedLog, path: Path, *, steps: int | None) -> int:
    intact = log.num_steps
    if steps is None and log.final_digest is None:
        raise DataError(
            f"{path}: is damaged, or its run is not finished: {intact} steps are intact, and no end follows them"
            + (f"; to rebuild the model after them, add --steps {intact}" if intact else "")
        )
    if steps is not None and steps > intact:
        raise UsageError(f"--steps {steps}: {path} has {intact} intact steps")
    return intact if steps is None else steps


def _check_base(logged: dict[str, str], found: dict[str, str], *, path: Path, base: str) -> None:
    """Refuses a model that the run did not begin with."""
    differences = {
        "shapes": "it has other parameters, or of another shape or type",
        "trained": "the parameters that were trained have other values",
        "frozen": "what was not trained has other values",
    }
    for key, difference in differences.items():
        if logged[key] != found[key]:
            raise DataError(
                f"{base}: is not the base model that {path} belongs to: {difference} (fingerprint "
                f"{found[key][:12]}, the log's {logged[key][:12]}); name the model, and revision, that the run "
                "began with"
            )


def _compare(parameters: TrainableParameters, log: SeedLog, *, path: Path) -> None:
    if parameters.digest() == log.final_digest:
        _log.info("the weights are those of the run, bit for bit")
        return
    ran, here = log.header["base"]["device"], parameters.device.type
    _log.warning(
        "%s: the weights differ from the run's in some bits: it ran on %s, and this is %s",
        path,
        ran,
        here if here != ran else f"{here} too, of another kind or under another version of torch",
    )
