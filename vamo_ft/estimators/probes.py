"""Directional derivatives of each sample's loss by finite differences.

Shapes: n samples, q probes (`num_probes`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import perturbed
from vamo_ft.core.protocols import Directions, Objective, Runtime
from vamo_ft.core.types import Batch, Work

__all__ = ["Difference", "LossProbe", "ProbePoint", "probe_points", "probe_work"]

Difference = Literal["central", "forward"]


@dataclass(frozen=True, slots=True)
class ProbePoint:
    """A point where losses are evaluated: `x + coefficient * z_probe`, or x itself when `probe` is None.

    A loss L seen there adds `weight * L` to the derivative along z_probe (at x: along every direction).
    """

    probe: int | None
    coefficient: float
    weight: float

    @property
    def columns(self) -> slice:
        """The derivatives that a loss at this point enters."""
        return slice(None) if self.probe is None else slice(self.probe, self.probe + 1)


def probe_points(difference: Difference, *, num_probes: int, eps: float) -> tuple[ProbePoint, ...]:
    """The evaluations that give q directional derivatives.

    central: `c_j = [f(x + eps z_j) - f(x - eps z_j)] / (2 eps)`, 2q points, error O(eps^2).
    forward: `c_j = [f(x + eps z_j) - f(x)] / eps`, q + 1 points, error O(eps).

    Source: Spall 1992; Malladi et al. 2023 (arXiv 2305.17333), Definition 1.
    """
    if difference == "central":
        return tuple(
            ProbePoint(probe, sign * eps, sign / (2 * eps)) for probe in range(num_probes) for sign in (1.0, -1.0)
        )
    base = ProbePoint(None, 0.0, -1 / eps)
    return (base, *(ProbePoint(probe, eps, 1 / eps) for probe in range(num_probes)))


class LossProbe:
    """Evaluates per-sample losses at probe points, with dropout off and without gradients."""

    def __init__(
        self, objective: Objective, parameters: TrainableParameters, directions: Directions, runtime: Runtime
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self._directions = directions
        self._runtime = runtime

    def at(self, point: ProbePoint, keys: Sequence[HashKey]) -> AbstractContextManager[None]:
        """Within the block the parameters are at `point`; afterwards their old bits."""
        if point.probe is None:
            return nullcontext()
        return perturbed(self._parameters, self._directions, key=keys[point.probe], coefficient=point.coefficient)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """(B,) float64 summed loss of each sample at the parameters' present values."""
        self._objective.module.eval()
        with self._runtime.autocast():
            return self._objective.terms(batch.to(self._runtime.device)).total.double()

    def evaluate(
        self, micro_batches: Sequence[Batch], points: Sequence[ProbePoint], keys: Sequence[HashKey]
    ) -> Iterator[tuple[ProbePoint, Tensor]]:
        """The (n,) losses of all micro-batches at each point in turn."""
        for point in points:
            with self.at(point, keys):
                losses = torch.cat([self.losses(batch) for batch in micro_batches])
            yield point, losses

    def derivatives(
        self, micro_batches: Sequence[Batch], points: Sequence[ProbePoint], keys: Sequence[HashKey]
    ) -> tuple[Tensor, Tensor]:
        """Derivative of each sample's summed loss along each direction.

        Returns:
            (n, q) float64 derivatives, and the () float64 mean over the points of the summed loss.
        """
        samples = sum(len(batch) for batch in micro_batches)
        result = torch.zeros(samples, len(keys), dtype=torch.float64, device=self._runtime.device)
        total = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        for point, losses in self.evaluate(micro_batches, points, keys):
            result[:, point.columns] += point.weight * losses.unsqueeze(1)
            total += losses.sum() / len(points)
        return result, total


def probe_work(micro_batches: Sequence[Batch], points: Sequence[ProbePoint]) -> Work:
    """What evaluating the micro-batches at every point costs."""
    samples = sum(len(batch) for batch in micro_batches)
    tokens = sum(batch.num_tokens for batch in micro_batches)
    return Work(forward_samples=samples * len(points), forward_tokens=tokens * len(points))
