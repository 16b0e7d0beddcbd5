"""Plain SGD along a projected gradient, without ever forming it."""

from collections.abc import Mapping

from torch import Tensor

from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, StateDict
from vamo_ft.core.types import Estimate
from vamo_ft.optim.carriers import update_rounding
from vamo_ft.optim.decay import decays

__all__ = ["ProjectedSgd"]


class ProjectedSgd:
    """`x <- (1 - lr wd) x - lr sum_j c_j z_j`, the directions made anew from their keys in one pass over memory.

    Allocates no gradient. bfloat16 weights are rounded stochastically, so that updates far below one ulp do not vanish
    in the mean. Biases and norms do not decay, nor do tensors that the step's directions do not reach.

    Args:
        max_grad_norm: clips `sqrt(c^T G c)`, the norm of the estimate; for one probe that is |c| sqrt(d), so a small
            bound means normalised descent. None measures and clips nothing.

    Source: Malladi et al. 2023, arXiv 2305.17333, Algorithm 1.
    """

    def __init__(
        self,
        parameters: TrainableParameters,
        directions: Directions,
        *,
        weight_decay: float,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        self._parameters = parameters
        self._directions = directions
        self._weight_decay = weight_decay
        self._max_grad_norm = max_grad_norm
        self._seed = seed

    def apply(self, estimate: Estimate, *, learning_rate: float, step: int) -> Mapping[str, Tensor | float | None]:
        """One update."""
        projected = estimate.projected
        assert projected is not None, "this rule takes coefficients, not gradients"
        coefficients, norm = projected.coefficients, None
        if self._max_grad_norm is not None:
            gram = self._directions.gram(projected.keys)
            norm = (coefficients @ gram @ coefficients).sqrt()
            coefficients = coefficients * (self._max_grad_norm / norm).clamp(max=1.0)
        decay = 1 - learning_rate * self._weight_decay
        self._directions.axpy_(
            self._parameters.tensors,
            -learning_rate * coefficients,
            projected.keys,
            scales=[decay if decays(tensor) else 1.0 for tensor in self._parameters.tensors] if decay != 1 else None,
            rounding=update_rounding(self._seed, step),
        )
        return {"grad_norm": norm}

    def state_dict(self) -> StateDict:
        """Nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Nothing is kept between steps."""
