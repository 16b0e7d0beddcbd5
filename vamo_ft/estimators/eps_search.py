"""The perturbation size whose finite differences agree best with back-propagation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Objective, Runtime
from vamo_ft.core.types import Batch, Work
from vamo_ft.estimators.probes import Difference, LossProbe, probe_points

__all__ = ["EPS_CANDIDATES", "RADIUS_CANDIDATES", "EpsChoice", "EpsSearch", "correlation"]

EPS_CANDIDATES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Per coordinate, for directions of norm sqrt(d). Rounding drowns the small ones, in bfloat16 above all, and curvature
bends the large ones."""

RADIUS_CANDIDATES = (0.007, 0.02, 0.07, 0.2, 0.5)
"""For directions of norm 1."""

_FALLBACK = 1  # the candidate to take where nothing correlates, as with one sample


@dataclass(frozen=True, slots=True)
class EpsChoice:
    """The chosen eps, its correlation with the exact derivatives, and what the search cost."""

    eps: float
    correlation: float
    work: Work


@dataclass(frozen=True, slots=True)
class EpsSearch:
    """Compares finite differences of a few samples with `<grad L_i, z_j>` for each candidate eps.

    Both are centred per direction, since only differences between samples enter the correction: a common offset, such
    as the curvature term of a forward difference, does no harm.
    """

    objective: Objective
    parameters: TrainableParameters
    directions: Directions
    runtime: Runtime
    probe: LossProbe
    difference: Difference
    candidates: tuple[float, ...]

    def run(self, samples: Sequence[Batch], together: Batch, keys: Sequence[HashKey]) -> EpsChoice:
        """Tries every candidate, in each process alike; the main one's choice holds for all. Collective.

        Args:
            samples: batches of one sample each; two or more, or there is nothing to compare.
            together: the same samples in one batch.
            keys: a few of the snapshot's directions.
        """
        exact = torch.stack([self._exact(sample, keys) for sample in samples])  # (n, q)
        work = Work.forward(samples) + Work.backward(samples)
        best = (self.candidates[_FALLBACK], 0.0)
        for eps in self.candidates:
            points = probe_points(self.difference, num_probes=len(keys), eps=eps)
            estimated, _ = self.probe.own_derivatives([together], points, keys)
            work += self.probe.work([together], points, keys)
            best = max(best, (eps, correlation(estimated, exact)), key=lambda choice: choice[1])
        eps, agreement = self.runtime.agreed(list(best))
        return EpsChoice(eps, agreement, work)

    def _exact(self, sample: Batch, keys: Sequence[HashKey]) -> Tensor:
        """(q,) float64 derivatives of the sample's summed loss by back-propagation."""
        self.parameters.clear_gradients()
        self.objective.module.eval()
        with self.runtime.autocast():
            total = self.objective.terms(sample.to(self.runtime.device)).total.sum()
        self.runtime.backward(total)
        derivatives = self.directions.dots([tensor.grad for tensor in self.parameters.tensors], keys)
        self.parameters.clear_gradients()
        return derivatives


def correlation(first: Tensor, second: Tensor) -> float:
    """Of (n, q) values, centred in each column; 0 where one of them does not vary."""
    first, second = first - first.mean(0), second - second.mean(0)
    scale = first.norm() * second.norm()
    return float((first * second).sum() / scale) if 0 < scale < torch.inf else 0.0
