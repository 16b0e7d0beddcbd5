"""Which evaluation of a run is the best, whether a better one is still to be waited for, and where its model is."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vamo_ft.core.errors import DataError
from vamo_ft.training.checkpoint import checkpoint_path, open_checkpoint

__all__ = ["Ranking", "best_model"]

_log = logging.getLogger("vamo_ft")

Evaluation = Mapping[str, Any]
"""One line of an evaluator's history: `step`, and `eval.<metric>` for each metric."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The order of a run's evaluations. The one before the first update is none of them: it is of another model.

    All answers follow from the evaluations so far, so that a run that goes on gives them again without a state.

    Attributes:
        metric: what is compared, such as loss or accuracy.
        lower_is_better: whether a smaller value is the better one, as of losses.
        patience: evaluations in a row without an improvement after which a run ends; None: it does not.
        threshold: what an improvement has to exceed, in the metric's unit.
    """

    metric: str
    lower_is_better: bool
    patience: int | None = None
    threshold: float = 0.0

    def order(self, history: Sequence[Evaluation]) -> list[Evaluation]:
        """The evaluations, best first and of equal ones the earliest; values that are not numbers are left out."""
        trained = [line for line in history if line["step"] > 0 and not math.isnan(self._value(line))]
        return sorted(trained, key=self._value, reverse=True)  # stable

    def best(self, history: Sequence[Evaluation]) -> Evaluation | None:
        """The first in `order`; None where there is no evaluation yet."""
        return next(iter(self.order(history)), None)

    def is_exhausted(self, history: Sequence[Evaluation]) -> bool:
        """Whether the last `patience` evaluations brought no improvement.

        One that exceeds the last improvement by more than `threshold` is the next: small steps add up to one.
        """
        waited, reference = 0, -math.inf
        for line in history:
            if line["step"] == 0:
                continue
            value = self._value(line)
            if value > -math.inf and (reference == -math.inf or value - reference > self.threshold):
                waited, reference = 0, value
            else:
                waited += 1
        return self.patience is not None and waited >= self.patience

    def _value(self, line: Evaluation) -> float:
        """The larger the better."""
        value = float(line[f"eval.{self.metric}"])
        return -value if self.lower_is_better else value


def best_model(
    ranking: Ranking, history: Sequence[Evaluation], *, checkpoints: Path, step: int
) -> tuple[Evaluation, Path] | None:
    """The best evaluation whose model is on the disk, and the folder of that model; those that are not are told.

    Args:
        checkpoints: folder of the run's checkpoints.
        step: the run's, whose model is in memory.

    Returns:
        None: it is the model in memory, or no other was evaluated.
    """
    for line in ranking.order(history):
        if line["step"] == step:
            return None
        try:
            return line, open_checkpoint(checkpoint_path(checkpoints, line["step"])).model_dir
        except DataError as error:
            _log.warning("the %s of step %d was better, but its model is lost: %s", ranking.metric, line["step"], error)
    return None
