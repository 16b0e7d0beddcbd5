"""The variance of batch gradients, and of corrected ones, in one pass that keeps no gradient.

Shapes: M batches, q directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.second_moment import squared_norm

__all__ = ["Contrasts", "CorrectedVariance"]


@dataclass(frozen=True, slots=True)
class CorrectedVariance:
    """`Var(v(alpha)) = Var(g) - 2 alpha S_ab + alpha^2 S_bb` of `v = g - alpha sum_j w_j z_j`, contrast by contrast.

    Attributes:
        squares: (M - 1,) float64, of which Var(g) is the mean.
        products: (M - 1,) likewise for S_ab, `(a - E a)^T w`.
        corrections: (M - 1,) likewise for S_bb, `w^T G w`; it equals `b^T w` where w is the projection's.
    """

    squares: Tensor
    products: Tensor
    corrections: Tensor

    def ratio(self, alpha: Tensor, rows: Tensor) -> Tensor:
        """Var(v) / Var(g) over chosen contrasts.

        Args:
            alpha: (M - 1,) coefficient of each contrast.
            rows: (..., m) numbers of contrasts.

        Returns:
            (...) float64.
        """
        corrected = self.squares - 2 * alpha * self.products + alpha.square() * self.corrections
        return corrected[rows].sum(-1) / self.squares[rows].sum(-1)

    def best_alpha(self, rows: Tensor) -> Tensor:
        """(...) float64 `S_ab / S_bb`, of least variance over (..., m) contrasts; 0 without a correction."""
        slope = self.products[rows].sum(-1) / self.corrections[rows].sum(-1)
        return torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)

    def best_ratio(self, rows: Tensor) -> Tensor:
        """(...) float64 Var(v) / Var(g) at `best_alpha`, `1 - S_ab^2 / (S_bb Var(g))`."""
        removed = self.best_alpha(rows) * self.products[rows].sum(-1)
        return 1 - removed / self.squares[rows].sum(-1)


class Contrasts:
    """Helmert contrasts of gradients that come one after the other.

    From gradient number k (counted from 1) and the mean of those before it,

        y_k = sqrt((k - 1) / k) (g_k - mean(g_1 .. g_{k-1})),      k = 2 .. M.

    They are an orthonormal transform of the g_k less their mean: `sum_k |y_k|^2 = sum_k |g_k - mean(g)|^2` exactly
    (Welford 1962), and for independent gradients each has mean 0 and covariance Cov(g), uncorrelated with the others.
    So they can be resampled like M - 1 draws of the noise itself. The same transform of `a_k = Z^T g_k` and of the
    correction's coefficients w_k gives the terms of the corrected variance. One running mean is kept, and M numbers.

    Args:
        gram: (q, q) `G_jk = <z_j, z_k>`.
    """

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram
        self._count = 0
        self._mean: list[Tensor] = []
        self._means: list[Tensor] = []  # of a and of w
        self._terms: list[Tensor] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor], derivatives: Tensor, weights: Tensor) -> None:
        """Takes in a batch.

        Args:
            gradients: g, one tensor for each parameter.
            derivatives: (q,) a.
            weights: (q,) w.
        """
        self._count += 1
        if self._count == 1:
            self._mean = [g.to(torch.promote_types(g.dtype, torch.float32), copy=True) for g in gradients]
            self._means = [derivatives.clone(), weights.clone()]
            return
        scale = (self._count - 1) / self._count
        square = torch.zeros((), dtype=torch.float64, device=weights.device)
        for mean, gradient in zip(self._mean, gradients, strict=True):
            difference = gradient - mean
            square += squared_norm([difference])
            mean.add_(difference, alpha=1 / self._count)
        a, w = (new - mean for new, mean in zip((derivatives, weights), self._means, strict=True))
        self._terms.append(scale * torch.stack([square, a @ w, w @ self._gram @ w]))
        self._means[0] += a / self._count
        self._means[1] += w / self._count

    def result(self) -> CorrectedVariance:
        """The terms of all contrasts so far, on the host; two batches or more."""
        squares, products, corrections = torch.stack(self._terms).cpu().unbind(1)
        return CorrectedVariance(squares, products, corrections)
