"""The rules of the `objective` section, and of the metrics that evaluation generates answers for."""

from pathlib import Path

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


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            VALID + F1,
            "16: objective.type: metric has no gradient, which method.name: vamo needs; write method.name: mezo, or "
            "objective.type: loss",
        ),
        (MEZO + ACCURACY, "16: objective.name: accuracy needs data.format.type: classification"),
        (CLASSIFICATION + F1, "18: objective.name: f1 needs data.format.type: prompt_completion or chat"),
        (SEQUENCE + F1, "19: objective.name: f1 needs data.format.type: prompt_completion or chat"),
        (
            CLASSIFICATION + "objective: {type: metric, name: accuracy, max_new_tokens: 8}\n",
            "18: objective.max_new_tokens: accuracy generates nothing (exact_match and f1 only); leave it out",
        ),
        (
            MEZO + "objective: {type: metric, name: bleu}\n",
            "16: objective.name: must be 'accuracy', 'exact_match' or 'f1', not 'bleu'",
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
            "18: evaluation.metrics: exact_match needs data.format.type: prompt_completion or chat",
        ),
        (
            MEZO + "evaluation: {max_new_tokens: 8}\n",
            "16: evaluation.max_new_tokens: nothing is generated; add exact_match or f1 to metrics, or leave it out",
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
