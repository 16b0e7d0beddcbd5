"""Metric objectives against plain forward passes, and what MeZO learns from one."""

from functools import partial

import pytest
import torch

from tests.tiny import byte_tokenizer, pair, tiny_bert_classifier, tiny_gpt2, tiny_llama
from vamo_ft.core.scores import exact_match, token_f1
from vamo_ft.data.collation import collate_for_classifier, collate_for_generation, collate_options
from vamo_ft.data.examples import Example
from vamo_ft.models.generation import greedy_decoder, text_decoder
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import SequenceClassification, VerbaliserClassification, _accuracy
from vamo_ft.objectives.generation import AnsweringLM, AnswerScores
from vamo_ft.objectives.metric import MetricObjective

TEXTS = ["hi", "there you", "one more of them", "k", "?", "some words"]
COMPLETIONS = [" a b", " c", " d e f", " g", " h", " i"]
EOS = 2


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text)["input_ids"])


def accuracy_of(objective) -> MetricObjective:
    return MetricObjective(objective, score=lambda batch: objective.evaluate(batch).scores["accuracy"])


@pytest.mark.parametrize("options", [(" a", " b", " c"), ("x", "y", "z"), (" yes", " no", " maybe not")])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_accuracy_terms_equal_the_argmax_over_options_by_plain_passes(build, options):
    model = build(seed=1)
    option_ids = [ids(text) for text in options]
    labels = [index % 3 for index in range(len(TEXTS))]
    items = [pair(i, ids(t), option_ids[n], n) for i, (t, n) in enumerate(zip(TEXTS, labels, strict=True))]
    expected = []
    for item in items:
        scores = []
        for option in option_ids:
            logits = model(input_ids=torch.tensor([item.prompt_ids + option])).logits[0, len(item.prompt_ids) - 1 : -1]
            scores.append(logits.log_softmax(-1)[range(len(option)), list(option)].mean().item())
        expected.append(float(max(range(3), key=scores.__getitem__) != item.label))
    batch = collate_options(items, options=option_ids, pad_token_id=0, position_ids=True)
    objective = accuracy_of(VerbaliserClassification(CausalLM(model, accepts_logits_to_keep=True)))
    terms = objective.terms(batch)
    assert terms.total.tolist() == expected
    assert terms.count.tolist() == [1.0] * len(items)
    assert 0 < sum(expected) < len(items)
    assert objective.module is model
    assert objective.evaluate(batch).loss.count.tolist() == [len(option_ids[n]) for n in labels]


def test_accuracy_terms_of_a_classifier_head():
    model = tiny_bert_classifier(num_labels=2)
    items = [pair(i, ids(text), (), i % 2) for i, text in enumerate(TEXTS)]
    terms = accuracy_of(SequenceClassification(model)).terms(
        collate_for_classifier(items, pad_token_id=0, token_type_ids=False)
    )
    chosen = [model(input_ids=torch.tensor([item.prompt_ids])).logits.argmax().item() for item in items]
    assert terms.total.tolist() == [float(chosen[item.index] != item.label) for item in items]


def answer_scores(model) -> AnswerScores:
    tokenizer = byte_tokenizer()
    return AnswerScores(
        generate=greedy_decoder(model, tokenizer, max_new_tokens=4),
        decode=text_decoder(tokenizer),
        scores={"exact_match": exact_match, "f1": token_f1},
    )


def answering_items(answers: dict[str, str]) -> list[Example]:
    return [pair(i, ids(p), (*ids(a), EOS), None) for i, (p, a) in enumerate(answers.items())]


class Scripted:
    """Answers each prompt from a table, and remembers what it was given."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers

    def __call__(self, prompt_ids, prompt_mask):
        self.prompts = [row[mask.bool()].tolist() for row, mask in zip(prompt_ids, prompt_mask, strict=True)]
        rows = [[*ids(answer), EOS] for answer in self.answers]
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def test_generated_answers_are_compared_with_the_completions():
    items = answering_items({"q": " Paris", "another prompt": " the old town", "w": " no"})
    generate = Scripted([" paris.", " in the old town", ""])
    scores = AnswerScores(
        generate=generate,
        decode=text_decoder(byte_tokenizer()),
        scores={"exact_match": exact_match, "f1": token_f1},
    )
    batch = collate_for_generation(items, pad_token_id=0, position_ids=True)
    assert {name: values.tolist() for name, values in scores(batch).items()} == {
        "exact_match": [1, 0, 0],
        "f1": [1, pytest.approx(0.8), 0],
    }
    assert generate.prompts == [list(item.prompt_ids) for item in items]
    objective = MetricObjective(
        CausalLM(tiny_llama(), accepts_logits_to_keep=True), score=lambda batch: scores(batch)["f1"]
    )
    terms = objective.terms(batch)
    assert terms.total.tolist() == [0, pytest.approx(0.2), 1]
    assert terms.total.dtype == torch.float32
    assert terms.count.tolist() == [1, 1, 1]


@pytest.mark.parametrize("build", [partial(tiny_llama, seed=2), tiny_gpt2])
def test_a_models_own_answers_match_exactly_and_others_do_not(build):
    """The references of half the samples are what a plain greedy loop generates."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(25)  # varied answers, no close logits
    items = []
    for index, text in enumerate(TEXTS):
        sequence = list(ids(text))
        for _ in range(4):
            sequence.append(model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax().item())
        answer = tuple(sequence[-4:])
        items.append(pair(index, ids(text), answer if index % 2 else (*ids(" zz"), EOS), None))
    objective = AnsweringLM(CausalLM(model, accepts_logits_to_keep=True), answer_scores(model))
    batch = collate_for_generation(items, pad_token_id=0, position_ids=True)
    terms = objective.evaluate(batch)
    assert terms.scores["exact_match"].tolist() == [0, 1, 0, 1, 0, 1]
    assert terms.scores["f1"].tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.equal(terms.loss.total, CausalLM(model, accepts_logits_to_keep=True).terms(batch).total)
    assert terms.loss.count.tolist() == [len(item.completion_ids) for item in items]


def test_scores_that_are_not_numbers_are_no_right_answer() -> None:
    """A diverged model must not look right: argmax of NaN is class 0."""
    scores = torch.tensor([[torch.nan, torch.nan], [0.0, 1.0], [1.0, torch.nan]])
    accuracy = _accuracy(scores, torch.tensor([0, 1, 0]))["accuracy"]
    assert accuracy.isnan().tolist() == [True, False, True]
    assert accuracy[1] == 1
