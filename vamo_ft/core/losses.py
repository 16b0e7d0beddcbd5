"""An objective as a module, for what wraps or replaces parts of a module."""

from torch import Tensor, nn

from vamo_ft.core.protocols import Objective
from vamo_ft.core.types import Batch

__all__ = ["LossModule"]


class LossModule(nn.Module):
    """Calls the objective, the module of which it holds, so that a wrapper sees whatever the objective does with it."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self._objective = objective

    def forward(self, batch: Batch) -> Tensor:
        """(B,) the samples' summed losses."""
        return self._objective.terms(batch).total
