"""Small functions with known gradients.

Shapes: B samples, d parameters.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms

__all__ = ["ClassLogits", "MlpClassifier", "NonconvexLeastSquares", "Quadratic"]


class _Point(nn.Module):
    """The d parameters of a synthetic function."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())


class _Synthetic:
    def __init__(self, start: Tensor) -> None:
        self._point = _Point(start)

    @property
    def module(self) -> nn.Module:
        """Holds the one parameter, `x`."""
        return self._point

    def terms(self, batch: Batch) -> LossTerms:
        """The function's value at each sample; every sample weighs its count."""
        return LossTerms(self._values(batch, self._point.x) * batch.counts, batch.counts)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """The loss alone."""
        return EvaluationTerms(self.terms(batch))

    def _values(self, batch: Batch, x: Tensor) -> Tensor:
        raise NotImplementedError


class Quadratic(_Synthetic):
    """`f_i(x) = 1/2 sum_k h_k (x_k - a_ik)^2`, with a_i in `features` (B, d).

    The gradient is `h (x - a_i)`, the Hessian diag(h) for every sample.

    Args:
        start: (d,) the starting point.
        curvature: (d,) h.
    """

    def __init__(self, start: Tensor, *, curvature: Tensor) -> None:
        super().__init__(start)
        self._curvature = curvature

    def _values(self, batch: Batch, x: Tensor) -> Tensor:
        return 0.5 * ((x - batch.inputs["features"]).square() * self._curvature).sum(1)


class NonconvexLeastSquares(_Synthetic):
    """`f_i(x) = (y_i - sigmoid(a_i . x))^2`, with a_i in `features` (B, d) and y_i in `targets` (B,).

    Source: the test function of ZO-SVRG (Liu et al. 2018, section 5) and of VAMO (arXiv 2505.13954).
    """

    def _values(self, batch: Batch, x: Tensor) -> Tensor:
        return (batch.targets["targets"] - torch.sigmoid(batch.inputs["features"] @ x)).square()


class ClassLogits(NamedTuple):
    """A network's output, as `SequenceClassification` reads it: (B, classes) logits."""

    logits: Tensor


class MlpClassifier(nn.Module):
    """`logits = W2 relu(W1 a + b1) + b2`, with one hidden layer; its loss is that of `SequenceClassification`.

    Initial values are torch's, drawn from torch's default generator: build it within `seeded_generator`.

    Args:
        width: elements of `features` (B, width).
        hidden: hidden units.
        classes: elements of the output.
    """

    def __init__(self, width: int, *, hidden: int, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden, dtype=dtype)
        self.outer = nn.Linear(hidden, classes, dtype=dtype)

    def forward(self, features: Tensor) -> ClassLogits:
        """The logits of each sample."""
        return ClassLogits(self.outer(torch.relu(self.inner(features))))
