"""From the task, the format and the `objective` section to what is trained and evaluated."""

from collections.abc import Sequence

from vamo_ft.config.data import ChatFormat, ClassificationFormat
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Objective
from vamo_ft.core.scores import exact_match, token_f1
from vamo_ft.data.chat import end_of_turn
from vamo_ft.models.generation import greedy_decoder, text_decoder
from vamo_ft.models.loading import LoadedModel
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import SequenceClassification, VerbaliserClassification
from vamo_ft.objectives.generation import AnsweringLM, AnswerScores
from vamo_ft.objectives.metric import MetricObjective

__all__ = ["build_loss", "build_objective"]

_ANSWER_SCORES = {"exact_match": exact_match, "f1": token_f1}


def build_objective(config: RunConfig, loaded: LoadedModel) -> Objective:
    """The loss that the task and the data format call for, or a metric in its place."""
    objective, trained = build_loss(config, loaded), config.objective
    if not isinstance(trained, MetricObjectiveConfig):
        return objective
    name = trained.name
    if trained.answer_tokens is None:
        return MetricObjective(objective, score=lambda batch: objective.evaluate(batch).scores[name])
    answer_scores = _build_answer_scores(config, loaded, [name], max_new_tokens=trained.answer_tokens)
    return MetricObjective(objective, score=lambda batch: answer_scores(batch)[name])


def build_loss(config: RunConfig, loaded: LoadedModel) -> Objective:
    """The loss that the task and the data format call for."""
    if config.model.task == "sequence_classification":
        return SequenceClassification(loaded.model)
    language_model = CausalLM(loaded.model, accepts_logits_to_keep=loaded.accepts_logits_to_keep)
    if isinstance(config.data.format, ClassificationFormat):
        return VerbaliserClassification(language_model)
    if config.evaluation.answer_tokens is None:
        return language_model
    names = [name for name in config.evaluation.metrics if name in _ANSWER_SCORES]
    return AnsweringLM(
        language_model, _build_answer_scores(config, loaded, names, max_new_tokens=config.evaluation.answer_tokens)
    )


def _build_answer_scores(
    config: RunConfig, loaded: LoadedModel, names: Sequence[str], *, max_new_tokens: int
) -> AnswerScores:
    ends = end_of_turn(loaded.tokenizer) if isinstance(config.data.format, ChatFormat) else None
    return AnswerScores(
        generate=greedy_decoder(loaded.model, loaded.tokenizer, max_new_tokens=max_new_tokens, end_of_turn=ends),
        decode=text_decoder(loaded.tokenizer),
        scores={name: _ANSWER_SCORES[name] for name in names},
    )
