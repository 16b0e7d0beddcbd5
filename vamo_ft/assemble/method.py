"""From the `method` and `optimizer` sections to estimator and update rule."""

import logging
import math
from importlib.util import find_spec

import torch

from vamo_ft.assemble.surroundings import Surroundings, due, run_length
from vamo_ft.config.method import (
    AddaxConfig,
    FirstOrderConfig,
    ForwardGradientConfig,
    SpsaConfig,
    SvrgConfig,
    VamoConfig,
    VamoLiteralConfig,
    ZoSvrgConfig,
)
from vamo_ft.config.optimizer import BITSANDBYTES, PAGED
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, GradientEstimator, Objective, Runtime, SampleSource, UpdateRule
from vamo_ft.core.rounding import count_finer_than_ulp
from vamo_ft.estimators.eps_search import EPS_CANDIDATES, RADIUS_CANDIDATES
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.forward_gradient import ForwardGradient
from vamo_ft.estimators.mixed import Addax
from vamo_ft.estimators.passes import SnapshotPasses
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.snapshot import Snapshots, SnapshotSettings
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.estimators.svrg import Svrg, SvrgSettings
from vamo_ft.estimators.vamo import AdaptiveRefresh, Vamo
from vamo_ft.estimators.vamo_literal import VamoLiteral, VamoLiteralSettings
from vamo_ft.estimators.zo_svrg import ZoSvrg, ZoSvrgSettings
from vamo_ft.optim.carriers import Carriers, has_low_precision
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.schedules import ScheduleName, learning_rate_at
from vamo_ft.optim.update_rules import DenseRule, build_optimizer

__all__ = ["build_estimator", "build_update_rule", "check_optimizer"]

_log = logging.getLogger("vamo_ft")


def build_estimator(
    config: RunConfig,
    objective: Objective,
    parameters: TrainableParameters,
    directions: Directions | None,
    runtime: Runtime,
    source: SampleSource,
    surroundings: Surroundings,
) -> GradientEstimator:
    """What turns the micro-batches of a step into a gradient estimate."""
    method, seed = config.method, config.run.seed
    progress, stop_requested = surroundings.progress, surroundings.stop_requested
    passes = SnapshotPasses(config.training.forward_batch_tokens, progress, stop_requested, runtime)
    match method:
        case FirstOrderConfig():
            return FirstOrder(objective, parameters, runtime, seed=seed)
        case SpsaConfig():
            assert directions is not None
            _warn_of_small_eps(method.eps, parameters)
            return Spsa(
                LossProbe(objective, parameters, directions, runtime, whole=config.objective.answer_tokens is not None),
                runtime,
                num_probes=method.probes,
                eps=method.eps,
                difference=method.difference,
                seed=seed,
                piecewise_constant=config.objective.type == "metric",
            )
        case VamoConfig():
            assert directions is not None
            if method.probes > directions.numel:
                raise UsageError(f"method.probes: {method.probes} exceeds the {directions.numel} trainable parameters")
            if method.eps != "auto":
                _warn_of_small_eps(method.eps, parameters)
            return _vamo(config, method, objective, parameters, directions, runtime, source, passes)
        case SvrgConfig():
            return _svrg(config, method, objective, parameters, runtime, source, passes)
        case ZoSvrgConfig():
            assert directions is not None
            _warn_of_small_eps(method.eps, parameters)
            return ZoSvrg(
                LossProbe(objective, parameters, directions, runtime, whole=config.objective.answer_tokens is not None),
                parameters,
                runtime,
                settings=ZoSvrgSettings(
                    num_probes=method.probes,
                    eps=method.eps,
                    difference=method.difference,
                    snapshot_due=due(method.snapshot.every, source),
                    subset=method.snapshot.subset,
                    full_step_scale=method.full_step_scale,
                    seed=seed,
                    piecewise_constant=config.objective.type == "metric",
                    offload=method.snapshot.offload,
                ),
                passes=passes,
            )
        case VamoLiteralConfig():
            assert directions is not None
            _warn_of_small_eps(method.radius / math.sqrt(directions.numel), parameters, key="method.radius / sqrt(d)")
            return VamoLiteral(
                FirstOrder(objective, parameters, runtime, seed=seed),
                objective,
                parameters,
                directions,
                runtime,
                settings=VamoLiteralSettings(
                    num_probes=method.probes,
                    radius=method.radius,
                    alpha=None if method.alpha == "theory" else method.alpha,
                    snapshot_due=due(method.snapshot.every, source),
                    seed=seed,
                    offload=method.snapshot.offload,
                ),
                passes=SnapshotPasses(1, progress, stop_requested, runtime),
            )
        case AddaxConfig():
            assert directions is not None
            _warn_of_small_eps(method.eps, parameters)
            _tell_split(method.boundary, source)
            return Addax(
                FirstOrder(objective, parameters, runtime, seed=seed),
                Spsa(
                    LossProbe(objective, parameters, directions, runtime),
                    runtime,
                    num_probes=method.probes,
                    eps=method.eps,
                    difference=method.difference,
                    seed=seed,
                ),
                parameters,
                directions,
                runtime,
                boundary=method.boundary,
                weight=method.weight,
            )
        case ForwardGradientConfig():
            assert directions is not None
            return ForwardGradient(objective, parameters, directions, runtime, num_probes=method.probes, seed=seed)


def _svrg(
    config: RunConfig,
    method: SvrgConfig,
    objective: Objective,
    parameters: TrainableParameters,
    runtime: Runtime,
    source: SampleSource,
    passes: SnapshotPasses,
) -> Svrg:
    num_steps = run_length(config, source)
    course: ScheduleName = "linear" if method.alpha_decay == "linear" else "constant"
    return Svrg(
        FirstOrder(objective, parameters, runtime, seed=config.run.seed),
        objective,
        parameters,
        runtime,
        settings=SvrgSettings(
            alpha_at=lambda step: learning_rate_at(
                step, schedule=course, peak=method.alpha, warmup_steps=0, total_steps=num_steps
            ),
            snapshot_due=due(method.snapshot.every, source),
            subset=method.snapshot.subset,
            normaliser=method.normaliser,
            seed=config.run.seed,
            offload=method.snapshot.offload,
        ),
        passes=passes,
    )


def _vamo(
    config: RunConfig,
    method: VamoConfig,
    objective: Objective,
    parameters: TrainableParameters,
    directions: Directions,
    runtime: Runtime,
    source: SampleSource,
    passes: SnapshotPasses,
) -> Vamo:
    snapshot, seed = method.snapshot, config.run.seed
    informed = method.structure == "gradient_subspace"
    size = method.radius if informed else method.eps
    snapshots = Snapshots(
        objective,
        parameters,
        directions,
        runtime,
        settings=SnapshotSettings(
            num_probes=method.probes,
            eps=size if isinstance(size, float) else None,
            candidates=RADIUS_CANDIDATES if informed else EPS_CANDIDATES,
            size_name="radius" if informed else "eps",
            difference=method.difference,
            subset=snapshot.subset,
            horizon=snapshot.every.count,
            source=method.source,
            orthogonalise=method.orthogonalise,
            normaliser=method.normaliser,
            seed=seed,
            offload=snapshot.offload,
        ),
        passes=passes,
    )
    return Vamo(
        FirstOrder(objective, parameters, runtime, seed=seed),
        snapshots,
        parameters,
        directions,
        alpha=None if method.alpha == "adaptive" else method.alpha,
        snapshot_due=due(snapshot.every, source),
        refresh=AdaptiveRefresh(snapshot.min_correlation, snapshot.budget) if snapshot.refresh == "adaptive" else None,
    )


def _tell_split(boundary: int, source: SampleSource) -> None:
    """How many samples are long; a warning where all are of one kind."""
    long, total = sum(source.length(index) > boundary for index in range(source.num_samples)), source.num_samples
    if 0 < long < total:
        _log.info("method.boundary: %d of %d samples are longer than %d tokens", long, total, boundary)
    else:
        _log.warning(
            "method.boundary: %s of the %d samples is longer than %d tokens, so that there is nothing to mix: the run "
            "is %s with a smaller learning rate",
            "each" if long else "none",
            total,
            boundary,
            "spsa" if long else "first_order",
        )


def _warn_of_small_eps(eps: float, parameters: TrainableParameters, *, key: str = "method.eps") -> None:
    parameters.settle()
    finer = parameters.total(torch.tensor(count_finer_than_ulp(parameters.tensors, eps)))
    if (share := int(finer) / parameters.numel) > 0.05:
        _log.warning(
            "%s: %g is below the spacing of representable values of %.0f %% of the weights; probe points are "
            "rounded at random there, which adds noise: make it larger, or take model.dtype: float32",
            key,
            eps,
            100 * share,
        )


def check_optimizer(config: RunConfig) -> None:
    """Asks for what an optimizer needs, before anything is loaded.

    Raises:
        UsageError: it needs a package, or a device, that is not here.
    """
    name = config.optimizer.name
    if name not in BITSANDBYTES:
        return
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"optimizer.name: {name} needs another package: pip install 'vamo-ft[bitsandbytes]'")
    if name in PAGED and not torch.cuda.is_available():
        raise UsageError(f"optimizer.name: {name} needs a CUDA device, and there is none; write {PAGED[name]}")


def build_update_rule(config: RunConfig, parameters: TrainableParameters, directions: Directions | None) -> UpdateRule:
    """What moves the parameters along an estimate.

    Raises:
        UsageError: the optimizer cannot be had here, or has nothing to keep master weights of.
    """
    optimizer, max_grad_norm = config.optimizer, config.training.max_grad_norm
    check_optimizer(config)
    if optimizer.master_weights and not has_low_precision(parameters):
        raise UsageError("optimizer.master_weights: all trained parameters are float32 themselves; leave it out")
    if config.method.projected and optimizer.is_plain_sgd:
        assert directions is not None
        return ProjectedSgd(
            parameters,
            directions,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=max_grad_norm,
            seed=config.run.seed,
            master_weights=optimizer.master_weights,
        )
    carriers = Carriers(parameters, seed=config.run.seed, master_weights=optimizer.master_weights)
    rule = build_optimizer(
        carriers,
        name=optimizer.name,
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        betas=optimizer.betas,
        eps=optimizer.eps,
    )
    return DenseRule(carriers, directions, rule, max_grad_norm=max_grad_norm)
