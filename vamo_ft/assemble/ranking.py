"""What evaluations say about checkpoints and about the end of a run."""

from dataclasses import dataclass

from vamo_ft.config.monitoring import EvaluationConfig
from vamo_ft.training.best import Ranking
from vamo_ft.training.callbacks import Evaluator

__all__ = ["Verdicts", "build_ranking"]


def build_ranking(evaluation: EvaluationConfig) -> Ranking | None:
    """The order of evaluations; None where nobody asks for the best."""
    if evaluation.ranked_by is None:
        return None
    return Ranking(
        evaluation.ranked_by,
        patience=evaluation.early_stopping_patience,
        threshold=evaluation.early_stopping_threshold,
    )


@dataclass(frozen=True, slots=True)
class Verdicts:
    """An evaluator's, where a run has one."""

    evaluator: Evaluator | None

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation so far."""
        best = None if self.evaluator is None else self.evaluator.best
        return None if best is None else int(best["step"])

    def is_best(self, step: int) -> bool:
        """Whether the best evaluation so far is that of `step`."""
        return self.best_step == step

    def ends_early(self, step: int) -> bool:
        """Whether the run ends with the evaluation of `step`."""
        return self.evaluator is not None and self.evaluator.gives_up(step)
