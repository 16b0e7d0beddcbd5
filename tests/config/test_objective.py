"""The rules of the `objective` section, and of the metrics that evaluation generates answers for."""

import pytest

from tests.config.examples import VALID, load_text, problems_of
from vamo_ft.config.load import dump_config
from vamo_ft.config.objective import LossObjectiveConfig, MetricObjectiveConfig

MEZO = VALID.replace("name: vamo", "name: mezo").replace("name: adamw", "name: sgd")
CLASSIFICATION = MEZO.replace(
    "type: prompt_completion", 'type: classification\n    template: "{x}"\n    labels: {a: x, b: y}'
)
SEQUENCE = CLASSIFICATION.replace("path: some/model", "path: some/model\n  task: sequence_classification")
F1 = "objective: {type: metric, name: f1}\n"
ACCURACY = "objective: {type: metric, name: accuracy}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            VALID + F1,
            "16: objective.type: metric has no gradient, which method.name: vamo needs; write method.name: mezo, or "
            "objective.type: loss",
        ),
        (
            MEZO + ACCURACY,
            "16: objective.name: accuracy needs data.format.type: classification, or a task with options",
        ),
        (
            CLASSIFICATION + F1,
            "18: objective.name: f1 needs data.format.type: prompt_completion or chat, or the task squad or drop",
        ),
        (
            SEQUENCE + F1,
            "19: objective.name: f1 needs data.format.type: prompt_completion or chat, or the task squad or drop",
        ),
        (
            CLASSIFICATION + "objective: {type: metric, name: accuracy, max_new_tokens: 8}\n",
            "18: objective.max_new_tokens: accuracy generates nothing (exact_match, f1 and rouge_l only); leave it out",
        ),
        (
            MEZO + "objective: {type: metric, name: bleu}\n",
            "16: objective.name: must be 'accuracy', 'exact_match', 'f1' or 'rouge_l', not 'bleu'",
        ),
        (
            MEZO + "objective: {type: metrics}\n",
            "16: objective.type: must be 'loss' or 'metric', not 'metrics'. Did you mean 'metric'?",
        ),
        (MEZO + "objective: {name: f1}\n", "16: objective.type: required: 'loss' or 'metric'"),
        (
            MEZO + "objective: {type: loss, name: f1}\n",
            "16: objective.name: unknown key here; it belongs to type: metric",
        ),
        (
            CLASSIFICATION + "evaluation: {metrics: [loss, exact_match]}\n",
            "18: evaluation.metrics: exact_match needs data.format.type: prompt_completion or chat, or the task squad "
            "or drop",
        ),
        (
            MEZO + "evaluation: {max_new_tokens: 8}\n",
            "16: evaluation.max_new_tokens: nothing is generated; add exact_match, f1 or rouge_l to metrics, or leave "
            "it out",
        ),
    ],
)
def test_rules(text: str, said: str) -> None:
    assert problems_of(text) == [f"config.yaml:{said}"]


@pytest.mark.parametrize("text", [CLASSIFICATION + ACCURACY, SEQUENCE + ACCURACY, MEZO + F1, VALID])
def test_what_is_dumped_loads_again(text: str) -> None:
    config = load_text(text).config
    assert load_text(dump_config(config)).config == config


def test_the_default_is_the_loss_and_only_answers_have_a_length() -> None:
    assert load_text(VALID).config.objective == LossObjectiveConfig(type="loss")
    assert load_text(VALID).sources["objective.type"] == "default"
    objective = load_text(MEZO + F1).config.objective
    assert isinstance(objective, MetricObjectiveConfig)
    assert objective.answer_tokens == 32
    objective = load_text(CLASSIFICATION + ACCURACY).config.objective
    assert isinstance(objective, MetricObjectiveConfig)
    assert objective.answer_tokens is None
    assert load_text(VALID).config.evaluation.answer_tokens is None
    metrics = "evaluation: {metrics: [f1], max_new_tokens: 5}\n"
    assert load_text(VALID + metrics).config.evaluation.answer_tokens == 5
