"""Plain SGD along a projected gradient, without ever forming it."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, StateDict
from vamo_ft.core.transfer import to_device
from vamo_ft.core.types import Estimate, ProjectedGradient, ProjectedUpdate
from vamo_ft.optim.carriers import Carriers, update_rounding
from vamo_ft.optim.decay import decays

__all__ = ["ProjectedSgd"]


class ProjectedSgd:
    """`x <- (1 - lr wd) x - lr sum_j c_j z_j`, the directions made anew from their keys in one pass over memory.

    Allocates no gradient. Coefficients are rounded to float32. bfloat16 weights are rounded stochastically, so that
    updates far below one ulp do not vanish in the mean; or float32 master weights take the update, and they are the
    nearest rounding of those (see `Carriers`). Biases and norms do not decay, nor do tensors that the step's directions
    do not reach.

    Args:
        master_weights: keep float32 values of weights of lower precision between the steps.
        max_grad_norm: clips `sqrt(c^T G c)`, the norm of the estimate; for one probe that is |c| sqrt(d), so a small
            bound means normalised descent. None measures and clips nothing.

    Attributes:
        applied: the update that was made last; None before the first.

    Source: Malladi et al. 2023, arXiv 2305.17333, Algorithm 1; section 2.1 notes that its coefficients and seeds alone
    give the whole trajectory.
    """

    def __init__(
        self,
        parameters: TrainableParameters,
        directions: Directions,
        *,
        weight_decay: float,
        max_grad_norm: float | None,
        seed: int,
        master_weights: bool = False,
    ) -> None:
        self._parameters = parameters
        self._carriers = Carriers(parameters, seed=seed, master_weights=True) if master_weights else None
        self._directions = directions
        self._weight_decay = weight_decay
        self._max_grad_norm = max_grad_norm
        self._seed = seed
        self.applied: ProjectedUpdate | None = None

    def apply(self, estimate: Estimate, *, learning_rate: float, step: int) -> Mapping[str, Tensor | float | None]:
        """One update."""
        projected = estimate.projected
        assert projected is not None, "this rule takes coefficients, not gradients"
        coefficients, norm = projected.coefficients, None
        if self._max_grad_norm is not None:
            gram = self._directions.gram(projected.keys)
            norm = (coefficients @ gram @ coefficients).sqrt()
            coefficients = coefficients * (self._max_grad_norm / norm).clamp(max=1.0)
        coefficients = coefficients.float().to(coefficients.dtype)  # what a seed log keeps in half of the bytes
        update = ProjectedUpdate(step, learning_rate, ProjectedGradient(coefficients, projected.keys))
        self.replay(update)
        self.applied = update
        return {"grad_norm": norm}

    def replay(self, update: ProjectedUpdate) -> None:
        """Makes an update that is known already; from the same parameters it leads to the same ones, bit for bit.

        Its coefficients may be in host memory, as those of a seed log are.
        """
        decay, keys = 1 - update.learning_rate * self._weight_decay, update.gradient.keys
        coefficients = -update.learning_rate * to_device(update.gradient.coefficients, self._parameters.device)

        def move(tensors: Sequence[Tensor], indices: Sequence[int]) -> None:
            self._directions.axpy_(
                tensors,
                coefficients,
                keys,
                scales=[decay if decays(tensor) else 1.0 for tensor in tensors] if decay != 1 else None,
                rounding=update_rounding(self._seed, update.step),
                indices=indices,
            )

        support = self._directions.support(keys)
        if self._carriers is None:
            self._parameters.change(support, move)
        else:
            move([self._carriers.tensors[index] for index in support], support)
            self._carriers.round(support)

    def state_dict(self) -> StateDict:
        """The master weights by parameter name; nothing else is kept between steps."""
        return {} if self._carriers is None else self._carriers.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        if self._carriers is not None:
            self._carriers.load_state_dict(state)
