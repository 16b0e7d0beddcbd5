"""Directional derivatives of each sample's loss by finite differences.

Shapes: n samples, q probes (`num_probes`).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.core.errors import VamoFtError
from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import Perturber
from vamo_ft.core.prefix import PrefixReuse
from vamo_ft.core.protocols import Directions, Objective, Runtime
from vamo_ft.core.shard_perturbation import ShardPerturber
from vamo_ft.core.types import Batch, Work
from vamo_ft.estimators.sharing import put_together

__all__ = ["Difference", "LossProbe", "ProbePoint", "not_reached", "probe_points", "probe_work"]

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


def not_reached(
    where: str, same: str = "the losses are the same", *, setting: Literal["eps", "radius"] = "eps"
) -> VamoFtError:
    """No loss depends on the perturbation; `setting` of the method is its size."""
    return VamoFtError(
        f"{where}: {same} at all probe points; the perturbation does not reach the model (method.{setting} too small "
        "for the precision, or frozen parameters)"
    )


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
    """Evaluates per-sample losses at probe points, with dropout off and without gradients.

    Args:
        whole: displace all parameters at once and reuse nothing, for an objective that runs the module many times per
            batch, as one that generates does.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: TrainableParameters,
        directions: Directions,
        runtime: Runtime,
        *,
        whole: bool = False,
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self._directions = directions
        self._runtime = runtime
        self._whole = whole or parameters.sharded  # processes have to keep in step, whatever one finds out
        self._perturber = (
            ShardPerturber(parameters, directions)
            if parameters.sharded
            else Perturber(objective.module, parameters, directions, whole=whole)
        )
        self._prefix = PrefixReuse(objective.module, parameters)

    def at(self, point: ProbePoint, keys: Sequence[HashKey]) -> AbstractContextManager[None]:
        """Within the block the module computes at `point`; afterwards at the parameters' own values again."""
        if point.probe is None:
            return nullcontext()
        return self._perturber.at(keys[point.probe], point.coefficient)

    def reaches_all(self, keys: Sequence[HashKey]) -> bool:
        """Whether the directions displace every trainable tensor, and not a block of them."""
        return len(self._directions.support(keys)) == len(self._parameters.tensors)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """(B,) float64 summed loss of each sample at the present point."""
        return self._perturber.checked(self._forward(batch))

    def _forward(self, batch: Batch) -> Callable[[], Tensor]:
        """One forward pass, which gives the losses."""
        self._objective.module.eval()
        batch = batch.to(self._runtime.device)

        def forward() -> Tensor:
            with self._runtime.autocast():
                return self._objective.terms(batch).total.double()

        return forward

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[Batch], points: Sequence[ProbePoint], keys: Sequence[HashKey]
    ) -> Generator[tuple[ProbePoint, slice, Tensor], None, None]:
        """The losses of each micro-batch at each point, with the place of its samples among all."""
        support = self._directions.support(keys)
        ends = list(accumulate(len(batch) for batch in micro_batches))
        places = [slice(end - len(batch), end) for end, batch in zip(ends, micro_batches, strict=True)]
        micro_batches = [batch.to(self._runtime.device) for batch in micro_batches]  # once for all points
        if self._whole or self._prefix.depth(support) == 0:
            for point in points:
                with self.at(point, keys):
                    for place, batch in zip(places, micro_batches, strict=True):
                        yield point, place, self.losses(batch)
            return
        for place, batch in zip(places, micro_batches, strict=True):
            with self._prefix.batch(support) as evaluate:
                forward = self._forward(batch)
                for point in points:
                    with self.at(point, keys):
                        yield point, place, self._perturber.checked(partial(evaluate, forward), plain=forward)

    def derivatives(
        self, micro_batches: Sequence[Batch], points: Sequence[ProbePoint], keys: Sequence[HashKey]
    ) -> tuple[Tensor, Tensor]:
        """Derivative of each sample's summed loss along each direction, shared out over processes; collective.

        Returns:
            (n, q) float64 derivatives, and the () float64 mean over the points of the summed loss.
        """
        passes = self._runtime.passes(micro_batches)
        derivatives, losses = self.own_derivatives([batch for batch, _ in passes], points, keys)
        ends = list(accumulate(len(batch) for batch, _ in passes))
        rows = torch.cat([derivatives, losses.unsqueeze(1)], 1)
        parts = [rows[end - len(batch) : end] for end, (batch, counts) in zip(ends, passes, strict=True) if counts]
        table = put_together(self._runtime, micro_batches, parts, width=(len(keys) + 1,))
        return table[:, :-1], table[:, -1].sum()

    def own_derivatives(
        self, batches: Sequence[Batch], points: Sequence[ProbePoint], keys: Sequence[HashKey]
    ) -> tuple[Tensor, Tensor]:
        """The same, of samples that all fall to this process.

        Returns:
            (n, q) float64 derivatives, and the (n,) float64 means over the points of the summed losses.
        """
        samples = sum(len(batch) for batch in batches)
        derivatives = torch.zeros(samples, len(keys), dtype=torch.float64, device=self._runtime.device)
        means = derivatives.new_zeros(samples)
        if not batches:
            return derivatives, means
        with closing(self.evaluate(batches, points, keys)) as evaluations:  # leaves the point also on an error
            for point, place, losses in evaluations:
                derivatives[place, point.columns] += point.weight * losses.unsqueeze(1)
                means[place] += losses / len(points)
        return derivatives, means

    def work(self, micro_batches: Sequence[Batch], points: Sequence[ProbePoint], keys: Sequence[HashKey]) -> Work:
        """What `evaluate` has cost with the same arguments."""
        plain = probe_work(micro_batches, points)
        repeated = sum(batch.num_tokens for batch in micro_batches) * (len(points) - 1)
        return plain + Work(reused_layer_tokens=repeated * self._prefix.reused(self._directions.support(keys)))


def probe_work(micro_batches: Sequence[Batch], points: Sequence[ProbePoint]) -> Work:
    """What evaluating the micro-batches at every point costs where nothing is reused."""
    return Work.forward(micro_batches, times=len(points))
