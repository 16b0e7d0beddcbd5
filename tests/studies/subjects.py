"""Subjects of measurements on toys."""

from collections.abc import Callable
from typing import Any

import torch

from tests.toys import SilentProgress, ToySource, build_vamo
from vamo_ft.assemble import Subject
from vamo_ft.assemble.subject import SnapshotPlan
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Objective
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Work
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.update_rules import DenseRule, build_optimizer


def three_units(work: Work) -> int:
    """A forward pass costs one unit a sample, a backward pass two."""
    return work.forward_samples + 2 * work.backward_samples


def build_toy_subject(
    objective: Objective,
    source: ToySource,
    *,
    directions: Callable[[TrainableParameters], Directions] = HashedDirections,
    method: str = "vamo",
    num_probes: int = 2,
    eps: float = 1e-4,
    alpha: float | None = 1.0,
    period: int = 4,
    learning_rate: float = 0.05,
    seed: int = 7,
    flops: Callable[[Work], int] = three_units,
    **changes: Any,
) -> Subject:
    parameters, runtime = TrainableParameters(objective.module), LocalRuntime()
    drawn = directions(parameters)
    first_order = FirstOrder(objective, parameters, runtime, seed=seed)
    vamo = None
    if method == "vamo":
        vamo = build_vamo(
            objective, directions=drawn, num_probes=num_probes, eps=eps, alpha=alpha, seed=seed, **changes
        )
    spsa = Spsa(
        LossProbe(objective, parameters, drawn, runtime),
        runtime,
        num_probes=num_probes,
        eps=eps,
        difference="central",
        seed=seed,
    )
    carriers = Carriers(parameters, seed=seed)
    optimizer = build_optimizer(carriers, name="sgd", weight_decay=0.0)
    return Subject(
        objective=objective,
        parameters=parameters,
        directions=drawn,
        runtime=runtime,
        source=source,
        first_order=first_order,
        training=spsa if vamo is None else first_order,
        update_rule=DenseRule(carriers, drawn, optimizer, max_grad_norm=None),
        learning_rate=lambda step: learning_rate,
        micro_batch_size=source.batch_size,
        num_probes=num_probes,
        eps=eps,
        sized_by_radius=False,
        difference=changes.get("difference", "central"),
        vamo=vamo,
        snapshots=None
        if vamo is None
        else SnapshotPlan(period * source.batch_size / source.num_samples, period, source.num_samples),
        alpha=alpha,
        plain_method="sgd",
        flops=flops,
        seed=seed,
        progress=SilentProgress(),
    )


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
