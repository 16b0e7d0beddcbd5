"""The forward gradient: exact directional derivatives by forward-mode differentiation.

Shapes: B samples in a batch, n of a step, q probes (`num_probes`).
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call

from vamo_ft.core.dense import dense_sum
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import HashKey, direction_keys
from vamo_ft.core.losses import LossModule
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Objective, Runtime
from vamo_ft.core.types import Batch, Estimate, ProjectedGradient, Work, total_count
from vamo_ft.estimators.stateless import Stateless

__all__ = ["ForwardGradient"]


class ForwardGradient(Stateless):
    """`g = (1/q) sum_j <grad f_I(x), z_j> z_j`, the derivatives exact and without a backward pass.

    f_I is the mean loss per token of the step, z_j the directions of `Spsa`, of which this is the limit for eps -> 0:
    no perturbation has to be chosen, and nothing is lost in rounding. Each sample's loss is evaluated with its
    derivative along z_j, a dual number for every activation, so that no activation outlives the layer that reads it.
    The direction of one probe at a time is held as a tensor beside each parameter, in the parameter's type (bfloat16
    rounds it to nearest). `E[g] = grad f_I`; the paper draws z from the normal distribution, but any law does for which
    `E[z z^T]` is the identity. Dropout is off, as in every method that estimates from losses.

    Work is told in plain forward passes: one over dual numbers counts as two (the paper says one to two: every product
    is also taken with the tangents), so that q probes cost 2q, as q central differences do.

    Args:
        num_probes: q.
        seed: the run's seed; directions are keyed by (seed, step, probe).

    Source: Baydin, Pearlmutter, Syme, Wood and Torr 2022, "Gradients without Backpropagation", arXiv 2202.08587,
    Definition 1 and Algorithm 1.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: TrainableParameters,
        directions: Directions,
        runtime: Runtime,
        *,
        num_probes: int,
        seed: int,
    ) -> None:
        self._losses = LossModule(objective)
        self._parameters = parameters
        self._directions = directions
        self._runtime = runtime
        self._num_probes = num_probes
        self._seed = seed

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """A pass over dual numbers for each of the q directions.

        Raises:
            UsageError: the model has an operation that cannot be differentiated forward.
        """
        keys = direction_keys(self._seed, step, self._num_probes)
        weight = total_count(micro_batches, self._runtime.device)
        own = [batch.to(self._runtime.device) for batch in self._runtime.mine(micro_batches)]
        totals = torch.stack([self._evaluate(own, key) for key in keys])  # (q, 2)
        self._runtime.sum_([totals])
        coefficients = totals[:, 1] / weight
        return Estimate(
            loss=totals[:, 0].mean() / weight,
            work=Work.forward(micro_batches, times=2 * self._num_probes),
            projected=ProjectedGradient(coefficients / self._num_probes, keys),
            metrics={"projected_gradient": coefficients.abs().mean()},
        )

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[Batch], key: HashKey) -> Tensor:
        """(2,) float64, the summed loss of all samples and its derivative along the direction."""
        self._losses.eval()
        one = torch.ones(1, dtype=torch.float64, device=self._runtime.device)
        tangents = dense_sum(self._directions, self._parameters, one, [key])
        total = torch.zeros(2, dtype=torch.float64, device=self._runtime.device)
        for batch in batches:
            with dual_level():
                duals = {
                    f"module.{self._parameters.names[index]}": _dual(self._parameters.tensors[index].detach(), tangent)
                    for index, tangent in tangents.items()
                }
                try:
                    with self._runtime.autocast():
                        losses, derivatives = _parts(functional_call(self._losses, duals, (batch,)))
                except NotImplementedError as error:
                    raise UsageError(
                        "method.name: forward_gradient needs a forward derivative of every operation of the model: "
                        f"{str(error).strip().splitlines()[0]} Write model.attn_implementation: eager if it is "
                        "another, or method.name: mezo"
                    ) from error
                total[0] += losses.double().sum()
                if derivatives is not None:  # or the losses do not depend on what the direction reaches
                    total[1] += derivatives.double().sum()
        return total


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own code, which the first call loads
        dual: Tensor = make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def _parts(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    value, tangent = unpack_dual(dual)  # type: ignore[no-untyped-call]
    return value, tangent
