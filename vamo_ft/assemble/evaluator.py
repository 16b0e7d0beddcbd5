"""The evaluations of a run, and what they say about its checkpoints and its end."""

from dataclasses import dataclass

from vamo_ft.assemble.surroundings import RunSurroundings, due, run_length
from vamo_ft.config.monitoring import LOWER_IS_BETTER, EvaluationConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Objective, Runtime
from vamo_ft.data.samples import EvaluationSamples, TrainingSamples
from vamo_ft.training.best import Ranking
from vamo_ft.training.callbacks import Evaluator
from vamo_ft.training.evaluation import EvaluationResult, evaluate

__all__ = ["Verdicts", "build_evaluator"]


def build_evaluator(
    config: RunConfig,
    objective: Objective,
    held_out: EvaluationSamples,
    runtime: Runtime,
    surroundings: RunSurroundings,
    source: TrainingSamples,
) -> Evaluator:
    """Evaluates before training, every period and at the end; ranks the results where the best is asked for."""

    def run() -> EvaluationResult:
        return evaluate(
            objective,
            held_out,
            runtime,
            token_budget=config.training.forward_batch_tokens,
            progress=surroundings.progress,
            stop_requested=surroundings.stop_requested,
        )

    return Evaluator(
        run,
        surroundings.writer,
        metrics=config.evaluation.metrics,
        identity=held_out.fingerprint,
        due=due(config.evaluation.every, source),
        num_steps=run_length(config, source),
        ranking=_ranking(config.evaluation),
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


def _ranking(evaluation: EvaluationConfig) -> Ranking | None:
    """The order of evaluations; None where nobody asks for the best."""
    if evaluation.ranked_by is None:
        return None
    return Ranking(
        evaluation.ranked_by,
        lower_is_better=evaluation.ranked_by in LOWER_IS_BETTER,
        patience=evaluation.early_stopping_patience,
        threshold=evaluation.early_stopping_threshold,
    )
