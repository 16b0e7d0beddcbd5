"""Synthetic problems, explicit directions and wiring for tests of the numerics."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import StopRequested
from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, GradientEstimator, Objective
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.second_moment import SecondMoment, squared_norm
from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms, Work
from vamo_ft.estimators.eps_search import EPS_CANDIDATES
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.passes import SnapshotPasses
from vamo_ft.estimators.snapshot import Snapshots, SnapshotSettings
from vamo_ft.estimators.vamo import Vamo
from vamo_ft.estimators.vamo_literal import VamoLiteral, VamoLiteralSettings
from vamo_ft.objectives.synthetic import NonconvexLeastSquares


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: int, *, done: int = 0) -> Iterator["SilentProgress"]:
        yield self

    def advance(self, amount: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class ToySource:
    """Samples in order, one epoch after the other (implements SampleSource)."""

    def __init__(
        self,
        features: Tensor,
        *,
        batch_size: int,
        targets: Tensor | None = None,
        frequencies: Sequence[float] | None = None,
        counts: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.features = features
        self.targets = torch.zeros(len(features), dtype=features.dtype) if targets is None else targets
        self.counts = torch.ones(len(features)) if counts is None else counts
        self.lengths = [1] * len(features) if lengths is None else lengths
        self.batch_size = batch_size
        self.frequencies = [1.0] * len(features) if frequencies is None else frequencies

    @property
    def num_samples(self) -> int:
        return len(self.features)

    @property
    def samples_per_epoch(self) -> int:
        return self.num_samples

    def frequency(self, index: int) -> float:
        return self.frequencies[index]

    @property
    def fingerprint(self) -> str:
        return "toy"

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = list(indices)
        return Batch(
            indices=tuple(rows),
            inputs={"features": self.features[rows]},
            targets={"targets": self.targets[rows]},
            counts=self.counts[rows].float(),
            num_tokens=sum(map(self.length, rows)),
        )

    def length(self, index: int) -> int:
        return self.lengths[index]

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        return [tuple(indices[start : start + token_budget]) for start in range(0, len(indices), token_budget)]

    def step_indices(self, step: int) -> tuple[int, ...]:
        first = step * self.batch_size
        return tuple(index % self.num_samples for index in range(first, first + self.batch_size))


class ExplicitDirections:
    """Given rows as directions: probe j is row j (implements Directions)."""

    def __init__(self, parameters: TrainableParameters, rows: Tensor) -> None:
        self.parameters = parameters
        self.rows = rows

    @property
    def numel(self) -> int:
        return self.parameters.numel

    rowwise = False

    def support(self, keys: Sequence[HashKey]) -> tuple[int, ...]:
        return tuple(range(len(self.parameters.tensors)))

    @torch.no_grad()
    def axpy_(
        self,
        tensors: Sequence[Tensor],
        coefficients: Tensor,
        keys: Sequence[HashKey],
        *,
        scales: Sequence[float] | None = None,
        rounding: HashKey | None = None,
        sources: Sequence[Tensor] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        assert scales is None
        total = coefficients.to(self.rows) @ self.rows[[key.probe for key in keys]]
        sources = tensors if sources is None else sources
        indices = range(len(tensors)) if indices is None else indices
        for tensor, source, index in zip(tensors, sources, indices, strict=True):
            offset = self.parameters.offsets[index]
            tensor.copy_(source + total[offset : offset + tensor.numel()].view_as(tensor).to(tensor))

    def displaced_rows(
        self,
        values: Tensor,
        rows: Tensor,
        *,
        index: int,
        coefficients: Tensor,
        keys: Sequence[HashKey],
        rounding: HashKey | None,
        out: Tensor | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors if tensor is not None]).double()
        return self.rows[[key.probe for key in keys]].double() @ flat

    def gram(self, keys: Sequence[HashKey]) -> Tensor:
        rows = self.rows[[key.probe for key in keys]].double()
        return rows @ rows.T

    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        gram, given = self.gram(keys), squared_norm(gradients)
        largest = float(torch.linalg.matrix_norm(gram, 2))
        return SecondMoment(
            float(gram.trace()), largest, float(self.dots(gradients, keys).square().sum()), float(given)
        )


class TinyNetwork(nn.Module):
    """A matrix, a bias and optional dropout, so that parameters have several shapes and names."""

    def __init__(self, width: int, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Linear(width, 3, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.layer(features))).square().sum(1)


class NetworkObjective:
    """The network's output, times the sample's weight, as its summed loss."""

    def __init__(self, network: TinyNetwork) -> None:
        self.network = network

    @property
    def module(self) -> nn.Module:
        return self.network

    def terms(self, batch: Batch) -> LossTerms:
        dtype = self.network.layer.weight.dtype
        output = self.network(batch.inputs["features"].to(dtype))
        return LossTerms(output.to(torch.promote_types(dtype, torch.float32)) * batch.counts, batch.counts)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        return EvaluationTerms(self.terms(batch))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def least_squares(*, num_samples: int, dimension: int, batch_size: int) -> tuple[NonconvexLeastSquares, ToySource]:
    features = normal(num_samples, dimension, seed=0)
    targets = (normal(num_samples, seed=1) > 0).double()
    objective = NonconvexLeastSquares(0.3 * normal(dimension, seed=2))
    return objective, ToySource(features, targets=targets, batch_size=batch_size)


def build_vamo(objective: Objective, *, directions: Directions | None = None, **changes: Any) -> Vamo:
    parameters = TrainableParameters(objective.module)
    runtime = LocalRuntime()
    directions = HashedDirections(parameters) if directions is None else directions
    settings: dict[str, Any] = {
        "num_probes": 2,
        "eps": 1e-4,
        "candidates": EPS_CANDIDATES,
        "difference": "central",
        "subset": None,
        "horizon": 0,
        "source": "table",
        "orthogonalise": True,
        "normaliser": "data",
        "seed": 7,
        "offload": False,
    }
    own: dict[str, Any] = {"alpha": 1.0, "snapshot_due": lambda step: False, "refresh": None}
    passes: dict[str, Any] = {"token_budget": 16, "progress": SilentProgress(), "stop_requested": lambda: False}
    for group in (settings, own, passes):
        group.update({name: changes.pop(name) for name in list(changes) if name in group})
    assert not changes, f"unknown settings {changes}"
    snapshots = Snapshots(
        objective,
        parameters,
        directions,
        runtime,
        settings=SnapshotSettings(**settings),
        passes=SnapshotPasses(**passes),
    )
    first_order = FirstOrder(objective, parameters, runtime, seed=settings["seed"])
    return Vamo(first_order, snapshots, parameters, directions, **own)


def build_literal(
    objective: Objective, *, stop_requested: Callable[[], bool] = lambda: False, **changes: Any
) -> VamoLiteral:
    parameters, runtime = TrainableParameters(objective.module), LocalRuntime()
    settings: dict[str, Any] = {
        "num_probes": 3,
        "radius": 1e-3,
        "alpha": None,
        "snapshot_due": lambda step: False,
        "seed": 7,
        **changes,
    }
    return VamoLiteral(
        FirstOrder(objective, parameters, runtime, seed=settings["seed"]),
        objective,
        parameters,
        HashedDirections(parameters, distribution="sphere"),
        runtime,
        settings=VamoLiteralSettings(**settings),
        passes=SnapshotPasses(1, SilentProgress(), stop_requested),
    )


def interrupted(
    build: Callable[[Callable[[], bool]], GradientEstimator], source: ToySource, *, every: int
) -> tuple[Any, Work]:
    """An estimator whose first snapshot was stopped at every so many polls, and each time begun again by a new one."""
    polls = itertools.count(1)
    state, stops, work = None, 0, None
    while work is None:
        estimator = build(lambda: next(polls) % every == 0)
        if state is not None:
            estimator.load_state_dict(state)
        try:
            work = estimator.prepare(source, 0)
        except StopRequested:
            stops, state = stops + 1, estimator.state_dict()
    assert stops >= 2
    return estimator, work


def move(objective: Objective, amount: float) -> None:
    with torch.no_grad():
        for parameter in objective.module.parameters():
            parameter += amount * normal(*parameter.shape, seed=9, dtype=parameter.dtype)


def gradient(objective: Objective) -> Tensor:
    """The concatenated `.grad` in layout order."""
    tensors = TrainableParameters(objective.module).tensors
    return torch.cat([tensor.grad.reshape(-1) for tensor in tensors if tensor.grad is not None])


def exact_gradient(objective: Objective, batch: Batch) -> Tensor:
    """The mean loss's gradient by autograd, without any of our estimators."""
    tensors = TrainableParameters(objective.module).tensors
    objective.module.eval()
    terms = objective.terms(batch)
    grads = torch.autograd.grad(terms.total.sum() / terms.count.sum(), tensors)
    return torch.cat([tensor.reshape(-1) for tensor in grads])
