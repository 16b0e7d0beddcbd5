"""From the `method` and `optimizer` sections to directions, estimator and update rule."""

import logging

from vamo_ft.assemble.surroundings import Surroundings, due
from vamo_ft.config.method import FirstOrderConfig, SpsaConfig, VamoConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import GradientEstimator, Objective, Runtime, UpdateRule
from vamo_ft.core.rounding import share_finer_than_ulp
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.estimators.vamo import Vamo, VamoSettings
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.update_rules import DenseRule, build_optimizer

__all__ = ["build_directions", "build_estimator", "build_update_rule"]

_log = logging.getLogger("vamo_ft")


def build_directions(config: RunConfig, parameters: TrainableParameters) -> HashedDirections | None:
    """The directions of a method that perturbs; None for back-propagation alone."""
    match config.method:
        case SpsaConfig() | VamoConfig():
            match config.method.directions.structure:
                case "full":
                    return HashedDirections(parameters, distribution=config.method.directions.distribution)
        case FirstOrderConfig():
            return None


def build_estimator(
    config: RunConfig,
    objective: Objective,
    parameters: TrainableParameters,
    directions: HashedDirections | None,
    runtime: Runtime,
    source: TrainingSamples,
    surroundings: Surroundings,
) -> GradientEstimator:
    """What turns the micro-batches of a step into a gradient estimate."""
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
                snapshot_due=due(snapshot.every, source),
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


def build_update_rule(
    config: RunConfig, parameters: TrainableParameters, directions: HashedDirections | None
) -> UpdateRule:
    """What moves the parameters along an estimate."""
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
