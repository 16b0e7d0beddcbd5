"""The rules of tasks, samples and of what can be measured on them."""

import pytest

from tests.config.examples import VALID, load_text, problems_of
from vamo_ft.config.tasks import TaskFormat

TASK = VALID.replace("type: prompt_completion", "type: task\n    name: NAME").replace(
    "{path: train.jsonl}", "\n    path: train.jsonl"
)
SEQUENCE = TASK.replace("path: some/model", "path: some/model\n  task: sequence_classification")


def task(text: str, name: str, *, train: str = "", more: str = "") -> str:
    return text.replace("NAME", name).replace("path: train.jsonl", f"path: train.jsonl{train}") + more


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            task(TASK, "rte", more="evaluation: {metrics: [f1]}\n"),
            "evaluation.metrics: f1 needs data.format.type: prom",
        ),
        (
            task(TASK, "copa", more="evaluation: {metrics: [perplexity]}\n"),
            "evaluation.metrics: perplexity needs data.format.type: prompt_completion, chat or text, or the task squad "
            "or drop",
        ),
        (
            task(TASK, "drop", more="evaluation: {metrics: [accuracy]}\n"),
            "evaluation.metrics: accuracy needs data.format.type: classification, or a task with options",
        ),
        (
            task(SEQUENCE, "copa"),
            "data.format.type: a sequence_classification model needs classification, or a task with classes",
        ),
        (
            task(SEQUENCE, "cb").replace("name: cb", "name: cb\n    shots: 2"),
            "data.format.shots: a sequence_classification model goes on with no text; write 0",
        ),
        (
            task(TASK, "squad", train="\n    sample: {per_class: 4}"),
            "data.train.sample.per_class: the format's rows have no classes; write size",
        ),
        (task(TASK, "rte", train="\n    sample: {seed: 4}"), "data.train.sample: write exactly one of size and per_"),
        (
            task(TASK, "rte", train="\n    sample: {size: 3, per_class: 4}"),
            "data.train.sample: write exactly one of size and per_class",
        ),
        (task(TASK, "mnli"), "data.format.name: must be 'sst2', "),
    ],
)
def test_what_does_not_fit_is_refused(text: str, said: str) -> None:
    [problem] = problems_of(text)
    assert problem.partition(": ")[2].startswith(said)


@pytest.mark.parametrize(
    "text",
    [
        task(TASK, "rte", train="\n    sample: {per_class: 16, seed: 1, skip: 16}"),
        task(TASK, "copa", more="evaluation: {metrics: [loss, accuracy]}\n"),
        task(TASK, "squad", more="evaluation: {metrics: [loss, perplexity, exact_match, f1, rouge_l]}\n"),
        task(SEQUENCE, "cb", more="evaluation: {metrics: [accuracy]}\n"),
    ],
)
def test_what_fits_is_taken(text: str) -> None:
    assert isinstance(load_text(text).config.data.format, TaskFormat)
