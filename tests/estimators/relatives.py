"""The variance-reduced relatives of VAMO, wired up over toy problems."""

from typing import Any

import torch
from torch import Tensor

from tests.toys import NetworkObjective, SilentProgress, TinyNetwork, ToySource, normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Objective
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.passes import SnapshotPasses
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.svrg import Svrg, SvrgSettings
from vamo_ft.estimators.zo_svrg import ZoSvrg, ZoSvrgSettings

SAMPLES = 24


def token_problem(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> tuple[NetworkObjective, ToySource]:
    """Samples of unequal weight."""
    counts = torch.arange(SAMPLES) % 5 + 1.0
    source = ToySource(normal(SAMPLES, 10, seed=1, dtype=dtype), batch_size=6, counts=counts)
    return NetworkObjective(TinyNetwork(10, dtype=dtype, dropout=dropout)), source


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def build_svrg(objective: Objective, **changes: Any) -> Svrg:
    parameters, runtime = TrainableParameters(objective.module), LocalRuntime()
    settings: dict[str, Any] = {
        "alpha_at": lambda step: 1.0,
        "snapshot_due": lambda step: False,
        "subset": None,
        "normaliser": "data",
        "seed": 7,
        **changes,
    }
    passes = _passes(settings)
    first_order = FirstOrder(objective, parameters, runtime, seed=settings["seed"])
    return Svrg(first_order, objective, parameters, runtime, settings=SvrgSettings(**settings), passes=passes)


def build_zo_svrg(objective: Objective, *, directions: Directions | None = None, **changes: Any) -> ZoSvrg:
    parameters, runtime = TrainableParameters(objective.module), LocalRuntime()
    settings: dict[str, Any] = {
        "num_probes": 2,
        "eps": 1e-3,
        "difference": "central",
        "snapshot_due": lambda step: False,
        "subset": None,
        "full_step_scale": 1.0,
        "seed": 7,
        **changes,
    }
    passes = _passes(settings)
    probe = LossProbe(objective, parameters, directions or HashedDirections(parameters), runtime)
    return ZoSvrg(probe, parameters, runtime, settings=ZoSvrgSettings(**settings), passes=passes)


def _passes(settings: dict[str, Any]) -> SnapshotPasses:
    stop_requested = settings.pop("stop_requested", lambda: False)
    return SnapshotPasses(settings.pop("token_budget", 16), SilentProgress(), stop_requested)
