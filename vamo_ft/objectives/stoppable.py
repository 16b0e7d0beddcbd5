"""Stops within a step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vamo_ft.core.errors import StopRequested
from vamo_ft.core.protocols import Objective
from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms

__all__ = ["StoppableObjective"]


@dataclass(frozen=True, slots=True)
class StoppableObjective:
    """An objective that asks before every pass whether to go on, so that no step of many passes delays a stop.

    An estimator leaves the parameters as they were when the objective raises, and its state as it was before the step;
    the step is made again by whoever goes on.

    Attributes:
        objective: what is evaluated.
        stop_requested: whether to stop.
    """

    objective: Objective
    stop_requested: Callable[[], bool]

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""
        return self.objective.module

    def terms(self, batch: Batch) -> LossTerms:
        """Those of the objective.

        Raises:
            StopRequested: instead of the pass.
        """
        self._ask()
        return self.objective.terms(batch)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """Those of the objective.

        Raises:
            StopRequested: instead of the pass.
        """
        self._ask()
        return self.objective.evaluate(batch)

    def _ask(self) -> None:
        if self.stop_requested():
            raise StopRequested("stopped between two passes")
