"""What a structure of directions can reach, in two numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SecondMoment", "squared_norm"]


@dataclass(frozen=True, slots=True)
class SecondMoment:
    """`P = E[z z^T]`, over what a step draws anew, beside a gradient g.

    A zeroth-order estimate along z has mean `P g`. The two numbers by which arXiv 2501.19099 (v1) explains structures
    are, in our reading,

        stable rank        tr P / |P|_2             how many coordinates share the perturbation
        effective overlap  g^T P g / (|P|_2 |g|^2)  the part of the gradient that the structure can see

    | structure | held fixed | P | tr P | norm of P |
    |---|---|---|---|---|
    | full (every distribution) | nothing | I | d | 1 |
    | block | the step's block B | I on B | elements of B | 1 |
    | sparse | the mask M | I on M | elements of M | 1 |
    | low_rank, (m, n) | V (n, r), for `refresh_every` steps | I_m (x) V V^T / r | m norm(V)_F^2 / r | norm(V)_2^2 / r |
    | subspace, (m, n) | orthonormal U, V, likewise | (m n / r^2) U U^T (x) V V^T | m n | m n / r^2 |
    | gradient_subspace | the basis z_1 .. z_k | sum_j z_j z_j^T | k | 1 |

    low_rank: `Z = U V^T / sqrt(r)` with `E[u_is u_jt]` 1 where i = j and s = t, else 0, so
    `E[Z_ij Z_kl] = [i = k] (V V^T)_jl / r`, and `g^T P g = |G V|_F^2 / r`. subspace: `Z = U S V^T sqrt(m n) / r` with S
    of independent unit elements, so `g^T P g = (m n / r^2) |U^T G V|_F^2`. Over the draw of U and V too, both have
    P = I, as `full` has. P is block diagonal over tensors: traces and quadratic forms add up, and the norm is the
    largest. Vectors count as in `full`. The directions of gradient_subspace are not drawn: P is their projector.

    Attributes:
        trace: tr P.
        largest: |P|_2.
        quadratic: g^T P g.
        squared_norm: |g|^2.
    """

    trace: float
    largest: float
    quadratic: float
    squared_norm: float

    @classmethod
    def identity_on(cls, numel: int, quadratic: Tensor, gradients: Sequence[Tensor | None]) -> "SecondMoment":
        """P is the identity on `numel` coordinates, on which the gradient has the squared norm `quadratic`."""
        return cls(numel, 1.0, float(quadratic), float(squared_norm(gradients)))

    @property
    def stable_rank(self) -> float:
        """`tr P / |P|_2`."""
        return self.trace / self.largest

    @property
    def overlap(self) -> float:
        """`g^T P g / (|P|_2 |g|^2)`, from 0 to 1; 0 where the gradient is zero."""
        return self.quadratic / (self.largest * self.squared_norm) if self.squared_norm > 0 else 0.0


def squared_norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """() float64 squared Euclidean norm of all tensors together; None stands for zeros."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors if tensor is not None]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
