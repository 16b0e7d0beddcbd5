"""A sketch of the gradients seen so far, from which their leading directions are read.

Shapes: k directions, 2k rows, d trainable parameters. A row is kept as one tensor for each parameter, of its shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vamo_ft.core.offload import Shelf
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import StateDict

__all__ = ["FrequentDirections", "combined", "inner_products"]

_CHUNK = 1 << 20  # elements of a row that are widened at one time
_MEAN_DECAY = 0.9


class FrequentDirections:
    """2k rows B with `B^T B` close to the covariance `sum_t c_t c_t^T` of centred gradients `c_t = g_t - EMA(g)`.

    A row is filled by each gradient. When all are full, B is rotated onto its singular vectors and shrunk,
    `s_i <- sqrt(max(s_i^2 - s_k^2, 0))`, which empties at least half of it. For every unit vector x,
    `0 <= x^T (A^T A - B^T B) x <= |A - A_k|_F^2 / (k - r)` for any r < k, A being all centred gradients.

    Source: Liberty 2013, "Simple and deterministic matrix sketching" (arXiv 1206.0594); the variant with 2k rows is of
    Ghashami, Liberty, Phillips and Woodruff 2016 (arXiv 1501.01711), section 2.2.

    Args:
        size: k.
        offload: keep rows and mean in host memory.
    """

    def __init__(self, parameters: TrainableParameters, *, size: int, offload: bool = False) -> None:
        self._parameters = parameters
        self._size = size
        self._rows = Shelf(
            (torch.zeros(2 * size, *p.shape, device=p.device) for p in parameters.tensors),
            device=parameters.device,
            offload=offload,
        )
        self._mean = self._rows.like(torch.zeros(p.shape, device=p.device) for p in parameters.tensors)
        self._filled = 0
        self._seen = 0

    @property
    def seen(self) -> int:
        """Gradients that came in so far."""
        return self._seen

    @torch.no_grad()
    def insert(self, gradients: Sequence[Tensor]) -> None:
        """Takes in a gradient, one tensor for each parameter."""
        first = self._seen == 0  # it is its own mean
        if not first and self._filled == 2 * self._size:
            self._shrink()
        for index, (mean, gradient) in enumerate(zip(self._mean, gradients, strict=True)):
            if not first:
                self._rows.write(index, self._filled, gradient.float() - mean)
            self._mean[index] = mean.lerp_(gradient.float(), 1.0 if first else 1 - _MEAN_DECAY)
        self._filled += not first
        self._seen += 1

    @torch.no_grad()
    def leading(self, count: int) -> Shelf:
        """The `count` leading directions, orthonormal, largest first.

        Returns:
            one (count, ...) float32 tensor for each parameter, kept as the rows are; a direction that the sketch does
            not hold is zero.
        """
        squares, vectors = self._spectrum()
        weights = _inverse_roots(squares)[:count, None] * vectors[:, :count].T
        basis = self._rows.like(combined(weights, row) for row in self._rows)
        correction = torch.linalg.cholesky(self._products(basis) + _missing(squares[:count]))
        rotation = torch.linalg.inv(correction).contiguous()
        self._parameters.agree_([rotation])
        for place, each in enumerate(basis):  # rotated rows are orthogonal to rounding: mended once, tensor by tensor
            basis[place] = combined(rotation, each)
        return basis

    def state_dict(self) -> StateDict:
        """Rows and mean."""
        saved = self._parameters.saved_all
        return {
            "rows": saved(self._rows.state(), leading=1),
            "mean": saved(self._mean.state()),
            "filled": self._filled,
            "seen": self._seen,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        own = self._parameters.own_all
        self._rows, self._mean = self._rows.like(own(state["rows"], leading=1)), self._mean.like(own(state["mean"]))
        self._filled, self._seen = state["filled"], state["seen"]

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Squared singular values (2k,), falling, and left singular vectors in columns (2k, 2k), float64."""
        squares, vectors = map(torch.Tensor.contiguous, torch.linalg.eigh(self._products(self._rows)))
        self._parameters.agree_([squares, vectors])
        return squares.flip(0).clamp(min=0.0), vectors.flip(1)

    def _products(self, vectors: Sequence[Tensor]) -> Tensor:
        return self._parameters.total(inner_products(vectors, vectors))

    def _shrink(self) -> None:
        squares, vectors = self._spectrum()
        kept = (squares - squares[self._size - 1]).clamp(min=0.0).sqrt()
        rotation = (kept * _inverse_roots(squares))[:, None] * vectors.T
        for index, row in enumerate(self._rows):
            self._rows[index] = combined(rotation, row)
        self._filled = self._size - 1


def inner_products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """(m, n) float64 inner products of m and n vectors, each given as one (m, ...) or (n, ...) tensor a parameter."""
    total = torch.zeros(len(first[0]), len(second[0]), dtype=torch.float64, device=first[0].device)
    for a, b in zip(first, second, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        for start in range(0, a.shape[1], _CHUNK):
            total += a[:, start : start + _CHUNK].double() @ b[:, start : start + _CHUNK].double().T
    return total


def combined(weights: Tensor, vectors: Tensor) -> Tensor:
    """(m, ...) `sum_j weights_ij v_j`, (m, n) weights of (n, ...) vectors, in the vectors' precision."""
    return (weights.to(vectors.dtype) @ vectors.flatten(1)).view(len(weights), *vectors.shape[1:])


def _inverse_roots(squares: Tensor) -> Tensor:
    """1 / sqrt(s), and 0 where s is rounding error beside the largest."""
    held = squares > squares[0] * 1e-12
    return torch.where(held, squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt(), 0.0)


def _missing(squares: Tensor) -> Tensor:
    """Ones on the diagonal for the directions that are zero."""
    return torch.diag((_inverse_roots(squares) == 0).to(squares.dtype))
