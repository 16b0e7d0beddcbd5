"""MeZO as its paper writes it down, to compare with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["LiteralMezo"]


class LiteralMezo:
    """Algorithm 1 of MeZO, word for word: four sweeps over the parameters, each with freshly drawn normals.

    For every step, with a seed s and z drawn from it parameter by parameter:

        theta <- theta + eps z,      l+ = L(theta; B)
        theta <- theta - 2 eps z,    l- = L(theta; B)
        theta <- theta + eps z
        theta_i <- theta_i - lr c z_i,    c = (l+ - l-) / (2 eps)

    The generator is seeded anew before each sweep, so that no z is ever stored.

    Args:
        parameters: what is trained, each tensor once.
        loss: (), L(theta; B) without a gradient.

    Source: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333, Algorithm 1.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], *, eps: float, learning_rate: float
    ) -> None:
        self._parameters = parameters
        self._loss = loss
        self._eps = eps
        self._learning_rate = learning_rate
        self._generator = torch.Generator(parameters[0].device)

    @torch.no_grad()
    def step(self, seed: int) -> float:
        """One step; returns the projected gradient c."""
        self._sweep(seed, self._eps)
        above = self._loss()
        self._sweep(seed, -2 * self._eps)
        below = self._loss()
        self._sweep(seed, self._eps)
        projected = float((above - below) / (2 * self._eps))
        self._sweep(seed, -self._learning_rate * projected)
        return projected

    def _sweep(self, seed: int, scale: float) -> None:
        """`theta <- theta + scale z(seed)`, in place."""
        self._generator.manual_seed(seed)
        for tensor in self._parameters:
            z = torch.normal(
                0.0, 1.0, size=tensor.shape, generator=self._generator, dtype=tensor.dtype, device=tensor.device
            )
            tensor.add_(z, alpha=scale)
