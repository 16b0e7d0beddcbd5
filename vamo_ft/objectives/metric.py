"""A metric as the objective, for methods that need no gradient.

Shapes: B samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vamo_ft.core.protocols import Objective
from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms

__all__ = ["MetricObjective"]


class MetricObjective:
    """`L_i = 1 - s_i`, with s_i the score of sample i; every sample weighs 1, so the mean loss is 1 - the metric.

    Piecewise constant in the parameters, with no gradient: for zeroth-order methods alone.

    Args:
        objective: whose module is trained; evaluation is its own.
        score: (B,) scores of a batch, from 0 to 1, of which more is better.

    Source: Malladi et al. 2023, arXiv 2305.17333, section 3.3.
    """

    def __init__(self, objective: Objective, *, score: Callable[[Batch], Tensor]) -> None:
        self._objective = objective
        self._score = score

    @property
    def module(self) -> nn.Module:
        """The module of the objective within."""
        return self._objective.module

    def terms(self, batch: Batch) -> LossTerms:
        """One minus the score of each sample; takes batches as the score does."""
        score = self._score(batch)
        return LossTerms(1 - score, torch.ones_like(score))

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """Losses and scores of the objective within."""
        return self._objective.evaluate(batch)
