"""Option scoring and answer scores of the tasks against plain, unbatched passes of the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.data.test_tasks import HUB
from tests.tiny import byte_tokenizer, tiny_gpt2, tiny_llama, write_jsonl
from vamo_ft.config.data import DataConfig
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.core.scores import rouge_l, token_f1
from vamo_ft.data.loading import load_samples
from vamo_ft.data.samples import EvaluationSamples
from vamo_ft.data.tasks import TASKS, TaskSample
from vamo_ft.models.generation import text_decoder
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.objectives.generation import AnsweringLM, AnswerScores

ROWS: dict[str, list[dict[str, Any]]] = {
    "rte": [HUB["rte"] | {"hypothesis": "Rain " * n, "label": n % 2} for n in range(1, 6)],
    "cb": [HUB["cb"] | {"premise": "it rains " * n, "label": n % 3} for n in range(1, 6)],
    "copa": [
        HUB["copa"] | {"choice1": "It " + "was " * n, "question": ["cause", "effect"][n % 2], "label": n % 2}
        for n in range(1, 6)
    ],
    "record": [
        HUB["record"]
        | {"entities": ["Ada", "Bob", "Rome", "Eve of the Hill"][:n], "answers": ["Eve", "Ada", "Bob"][:n]}
        for n in (2, 3, 4)
    ]
    + [HUB["record"] | {"query": "@placeholder slept.", "answers": ["Rome"]}],
}


def load(folder: Path, name: str, rows: list[dict[str, Any]], **keys: Any) -> tuple[Any, EvaluationSamples]:
    file = str(write_jsonl(folder / "rows.jsonl", rows))
    config = DataConfig(train={"path": file}, evaluation={"path": file}, format={"type": "task", "name": name})
    training, evaluation = load_samples(
        config, byte_tokenizer(), task="causal_lm", batch_size=2, seed=0, position_ids=True, offline=True, **keys
    )
    assert evaluation is not None
    return training, evaluation


def log_probs(model: PreTrainedModel, sample: TaskSample, option: str) -> torch.Tensor:
    """Of each token of an option after the prompt, from the full logits of one row."""
    prompt, tokens = (byte_tokenizer()(text)["input_ids"] for text in (sample.prompt, option))
    logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(tokens)), tokens]


@pytest.mark.parametrize("budget", [1, 900, 100_000])
@pytest.mark.parametrize(
    ("name", "build"), [("rte", tiny_llama), ("cb", tiny_gpt2), ("copa", tiny_gpt2), ("record", tiny_llama)]
)
@torch.no_grad()
def test_scores_equal_those_of_single_rows(tmp_path: Path, name: str, build: Any, budget: int) -> None:
    model = build(seed=3)
    samples = [TASKS[name].build(row, "here") for row in ROWS[name]]
    _, evaluation = load(tmp_path, name, ROWS[name])
    objective = VerbaliserClassification(CausalLM(model, accepts_logits_to_keep=True))
    seen: set[int] = set()
    for batch in evaluation.batches(token_budget=budget):
        assert budget > 1 or len(batch) == 1
        assert batch.inputs["input_ids"].numel() <= budget or len(batch) == 1
        terms = objective.evaluate(batch)
        assert terms.option_scores is not None
        for row, index in enumerate(batch.indices):
            sample = samples[index]
            rows = [log_probs(model, sample, option) for option in sample.options]
            expected = torch.stack([each.mean() for each in rows])
            torch.testing.assert_close(terms.option_scores[row, : len(rows)], expected, rtol=1e-4, atol=1e-5)
            assert terms.option_scores[row, len(rows) :].tolist() == [-torch.inf] * (
                terms.option_scores.shape[1] - len(rows)
            )
            assert terms.scores["accuracy"][row] == float(int(expected.argmax()) in sample.right)
            torch.testing.assert_close(-terms.loss.total[row], rows[sample.right[0]].sum(), rtol=1e-4, atol=1e-4)
            assert terms.loss.count[row] == len(rows[sample.right[0]])
            seen.add(index)
    assert seen == set(range(len(samples)))


def test_any_of_several_right_options_counts(tmp_path: Path) -> None:
    """Of one row the scores are turned so that each option in turn is the best."""
    [row] = [HUB["record"] | {"answers": ["Ada", "Rome"]}]
    _, evaluation = load(tmp_path, "record", [row])
    [batch] = evaluation.batches(token_budget=100_000)
    assert batch.targets["label"].tolist() == [0]

    class Turned(CausalLM):
        best = 0

        def token_log_probs(self, batch: Any) -> torch.Tensor:
            scores = torch.full(batch.targets["tokens"].shape, -2.0)
            scores[self.best] = -1
            return scores.masked_fill(batch.targets["tokens"] == -100, 0)

    turned = Turned(tiny_llama(), accepts_logits_to_keep=True)
    found = []
    for turned.best in range(3):
        found.append(VerbaliserClassification(turned).evaluate(batch).scores["accuracy"].item())
    assert found == [1, 0, 1]


def test_what_is_trained_is_the_first_right_option(tmp_path: Path) -> None:
    training, _ = load(tmp_path, "record", ROWS["record"])
    decode = text_decoder(byte_tokenizer())
    for index, row in enumerate(ROWS["record"]):
        [text] = decode([training.data[index].completion_ids])
        assert text == TASKS["record"].build(row, "here").completion
    metric = MetricObjectiveConfig(type="metric", name="accuracy")
    scored, _ = load(tmp_path, "record", ROWS["record"], metric=metric)
    batch = scored.batch([0, 2])
    assert batch.counts.tolist() == [1, 1]
    assert batch.inputs["input_ids"].shape[0] == 2 + 4
    assert len(scored.groups(range(4), token_budget=1)) == 4


def test_the_best_of_several_references_counts(tmp_path: Path) -> None:
    rows = [
        HUB["drop"] | {"answers_spans": {"spans": ["ten points", "10", "10 in all"]}},
        HUB["drop"] | {"answers_spans": {"spans": ["7"]}, "question": "First?"},
    ]
    _, evaluation = load(tmp_path, "drop", rows, answer_tokens=8)
    [batch] = evaluation.batches(token_budget=100_000)
    given = {0: " ten in all", 1: " 3"}
    answers = [given[index] for index in batch.indices]
    tokens = [byte_tokenizer()(text)["input_ids"] for text in answers]
    width = max(map(len, tokens))
    scores = AnswerScores(
        generate=lambda prompts, mask: torch.tensor([row + [2] + [0] * (width - len(row)) for row in tokens]),
        decode=text_decoder(byte_tokenizer()),
        scores={"f1": token_f1, "rouge_l": rouge_l},
    )
    objective = AnsweringLM(CausalLM(tiny_llama(), accepts_logits_to_keep=True), scores)
    terms = objective.evaluate(batch.to(torch.device("cpu")))
    assert terms.answers == tuple(answers)
    first = batch.indices.index(0)
    best = 2 * 2 / (3 + 3)  # 'in all' of 'ten in all' and '10 in all'
    for name in ("f1", "rouge_l"):
        assert terms.scores[name][first] == pytest.approx(best)
        assert terms.scores[name][1 - first] == 0
