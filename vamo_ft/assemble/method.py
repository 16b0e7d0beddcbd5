"""From the `method` and `optimizer` sections to directions, estimator and update rule."""

import logging

from torch import nn

from vamo_ft.assemble.surroundings import PassSurroundings, due, run_length
from vamo_ft.config.method import FirstOrderConfig, SpsaConfig, SvrgConfig, VamoConfig, ZoSvrgConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.blocks import BlockDirections, model_blocks
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.factored import LowRankDirections, SubspaceDirections
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, GradientEstimator, Objective, Runtime, SampleSource, UpdateRule
from vamo_ft.core.rounding import share_finer_than_ulp
from vamo_ft.core.runtime import free_memory_bytes
from vamo_ft.core.sparse import SparseDirections
from vamo_ft.estimators.eps_search import EPS_CANDIDATES, RADIUS_CANDIDATES
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.passes import SnapshotPasses
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.snapshot import Snapshots, SnapshotSettings
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.estimators.svrg import Svrg, SvrgSettings
from vamo_ft.estimators.vamo import AdaptiveRefresh, Vamo
from vamo_ft.estimators.zo_svrg import ZoSvrg, ZoSvrgSettings
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.schedules import ScheduleName, learning_rate_at
from vamo_ft.optim.update_rules import DenseRule, build_optimizer

__all__ = ["build_directions", "build_estimator", "build_update_rule"]

_log = logging.getLogger("vamo_ft")


def build_directions(config: RunConfig, parameters: TrainableParameters, module: nn.Module) -> Directions | None:
    """The directions of a method that perturbs; None for back-propagation alone."""
    if isinstance(config.method, FirstOrderConfig | SvrgConfig):
        return None
    directions = config.method.directions
    law, rank, refresh_every = directions.distribution, directions.rank, directions.refresh_every
    match directions.structure:
        case "full":
            return HashedDirections(parameters, distribution=law)
        case "block":
            assert directions.order is not None
            hashed, blocks = HashedDirections(parameters, distribution=law), model_blocks(module, parameters)
            _log.info("directions: %d blocks, one a step", len(blocks))
            return BlockDirections(hashed, blocks, order=directions.order)
        case "low_rank":
            assert law != "sphere" and rank is not None and refresh_every is not None
            return LowRankDirections(parameters, rank=rank, refresh_every=refresh_every, distribution=law)
        case "subspace":
            assert law != "sphere" and rank is not None and refresh_every is not None
            return SubspaceDirections(parameters, rank=rank, refresh_every=refresh_every, distribution=law)
        case "sparse":
            assert directions.quantile is not None
            return SparseDirections(parameters, quantile=directions.quantile, distribution=law)
        case "gradient_subspace":
            assert directions.warmup_steps is not None
            return _gradient_subspace(parameters, size=config.method.probes, warmup=directions.warmup_steps)


def build_estimator(
    config: RunConfig,
    objective: Objective,
    parameters: TrainableParameters,
    directions: Directions | None,
    runtime: Runtime,
    source: SampleSource,
    surroundings: PassSurroundings,
) -> GradientEstimator:
    """What turns the micro-batches of a step into a gradient estimate."""
    method, seed = config.method, config.run.seed
    passes = SnapshotPasses(config.training.forward_batch_tokens, surroundings.progress, surroundings.stop_requested)
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
                    subset=None if method.snapshot.set == "all" else method.snapshot.set.subset,
                    full_step_scale=method.full_step_scale,
                    seed=seed,
                    piecewise_constant=config.objective.type == "metric",
                ),
                passes=passes,
            )


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
            subset=None if method.snapshot.set == "all" else method.snapshot.set.subset,
            normaliser=method.normaliser,
            seed=config.run.seed,
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
    informed = method.directions.structure == "gradient_subspace"
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
            difference=method.difference,
            subset=None if snapshot.set == "all" else snapshot.set.subset,
            horizon=snapshot.every.count,
            source=method.source,
            orthogonalise=method.orthogonalise,
            normaliser=method.normaliser,
            seed=seed,
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


def _gradient_subspace(parameters: TrainableParameters, *, size: int, warmup: int) -> GradientSubspace:
    needed, free = GradientSubspace.state_bytes(parameters.numel, size), free_memory_bytes(parameters.device)
    if needed > free:
        raise UsageError(
            f"method.directions.structure: gradient_subspace keeps {3 * size + 1} float32 vectors of "
            f"{parameters.numel:,} elements, {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; train an "
            "adapter, or lower method.probes"
        )
    return GradientSubspace(parameters, size=size, warmup=warmup)


def _warn_of_small_eps(eps: float, parameters: TrainableParameters) -> None:
    if (share := share_finer_than_ulp(parameters.tensors, eps)) > 0.05:
        _log.warning(
            "method.eps: %g is below the spacing of representable values of %.0f %% of the weights; probe points are "
            "rounded at random there, which adds noise: take a larger eps, or model.dtype: float32",
            eps,
            100 * share,
        )


def build_update_rule(config: RunConfig, parameters: TrainableParameters, directions: Directions | None) -> UpdateRule:
    """What moves the parameters along an estimate."""
    optimizer, max_grad_norm = config.optimizer, config.training.max_grad_norm
    if config.method.projected and optimizer.name == "sgd" and optimizer.momentum == 0:
        assert directions is not None
        return ProjectedSgd(
            parameters,
            directions,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=max_grad_norm,
            seed=config.run.seed,
        )
    carriers = Carriers(parameters, seed=config.run.seed)
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
