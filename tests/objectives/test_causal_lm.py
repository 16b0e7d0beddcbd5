"""Per-sample terms against Hugging Face's own losses and brute force."""

from functools import partial

import pytest
import torch

from tests.tiny import byte_tokenizer, pair, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_llama_classifier
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.data.collation import collate_for_classifier, collate_for_language_model, collate_options
from vamo_ft.data.examples import Example
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import SequenceClassification, VerbaliserClassification

MODELS = {"llama": tiny_llama, "tied": partial(tiny_llama, tied=True), "gpt2": tiny_gpt2}
TEXTS = [("the cat", " sat"), ("a", " very long completion"), ("many words before it", "!")]


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text)["input_ids"])


def examples(texts=TEXTS) -> list[Example]:
    return [pair(index, ids(p), ids(c), index % 2) for index, (p, c) in enumerate(texts)]


def language_batch(items: list[Example]):
    return collate_for_language_model(items, pad_token_id=0, position_ids=True)


@pytest.mark.parametrize("name", MODELS)
def test_terms_reduce_to_hugging_faces_own_loss(name):
    model = MODELS[name]()
    objective = CausalLM(model, accepts_logits_to_keep=True)
    terms = objective.terms(language_batch(examples()))
    for row, example in enumerate(examples()):  # one unpadded row at a time
        sequence = torch.tensor([example.prompt_ids + example.completion_ids])
        labels = sequence.clone()
        labels[0, : len(example.prompt_ids)] = -100
        loss = model(input_ids=sequence, labels=labels).loss
        assert terms.count[row] == len(example.completion_ids)
        assert torch.allclose(terms.total[row] / terms.count[row], loss, rtol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_kept_positions_and_full_logits_agree(name):
    model = MODELS[name]()
    batch = language_batch(examples())
    gradients = []
    for accepts in (True, False):
        model.zero_grad()
        CausalLM(model, accepts_logits_to_keep=accepts).terms(batch).total.sum().backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in TrainableParameters(model).tensors]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_only_kept_positions_reach_the_head():
    model = tiny_llama()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    batch = language_batch(examples([("a prompt", " x"), ("another longer prompt", " y")]))
    CausalLM(model, accepts_logits_to_keep=True).terms(batch)
    assert seen == [2]  # two supervised bytes, at the same columns in both rows


@pytest.mark.parametrize("options", [(" a", " b", " c"), (" yes", " no", " maybe not")])
@pytest.mark.parametrize("name", MODELS)
def test_options_are_scored_by_mean_log_probability(name, options):
    """Multi-token options as rows, against one unpadded forward pass per option."""
    model = MODELS[name]()
    objective = VerbaliserClassification(CausalLM(model, accepts_logits_to_keep=True))
    option_ids = [ids(text) for text in options]
    items = [pair(i, ids(p), option_ids[label], label) for i, (p, label) in enumerate([("hi", 1), ("there you", 0)])]
    terms = objective.evaluate(collate_options(items, options=option_ids, pad_token_id=0, position_ids=True))
    for row, item in enumerate(items):
        scores = []
        for option in option_ids:
            sequence = torch.tensor([item.prompt_ids + option])
            log_probs = model(input_ids=sequence).logits.log_softmax(-1)[0, len(item.prompt_ids) - 1 : -1]
            scores.append(log_probs.gather(1, torch.tensor(option).unsqueeze(1)).mean().item())
        assert terms.scores["accuracy"][row].item() == (max(range(3), key=scores.__getitem__) == item.label)
        expected = -scores[item.label] * len(option_ids[item.label])
        assert terms.loss.total[row].item() == pytest.approx(expected, rel=1e-4)
        assert terms.loss.count[row] == len(option_ids[item.label])


def test_single_token_options_need_one_pass_and_equal_the_row_form():
    model = tiny_llama()
    objective = VerbaliserClassification(CausalLM(model, accepts_logits_to_keep=True))
    option_ids = [ids("x"), ids("y"), ids("z")]
    items = [pair(i, ids(text), option_ids[i], i) for i, text in enumerate(["one", "three words", "k"])]
    rows = []
    model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    batch = collate_options(items, options=option_ids, pad_token_id=0, position_ids=True)
    terms = objective.evaluate(batch)
    assert rows == [3]
    loss = objective.terms(language_batch(items))
    assert torch.allclose(terms.loss.total, loss.total, rtol=1e-5)
    logits = model(**batch.inputs).logits[:, -1]
    chosen = logits[:, [option[0] for option in option_ids]].argmax(1)
    assert terms.scores["accuracy"].tolist() == (chosen == torch.arange(3)).tolist()


@pytest.mark.parametrize("model", [tiny_llama_classifier(num_labels=3), tiny_bert_classifier(num_labels=3)])
def test_classifier_heads_reduce_to_hugging_faces_own_loss(model):
    objective = SequenceClassification(model)
    items = [pair(i, ids(text), (), i) for i, text in enumerate(["one", "three words", "k"])]
    batch = collate_for_classifier(items, pad_token_id=0, token_type_ids=False)
    terms = objective.terms(batch)
    result = model(**batch.inputs, labels=torch.arange(3))
    assert torch.allclose(terms.total.mean(), result.loss, rtol=1e-5)
    assert terms.count.tolist() == [1, 1, 1]
    accuracy = objective.evaluate(batch).scores["accuracy"]
    assert accuracy.tolist() == (result.logits.argmax(1) == torch.arange(3)).tolist()
    for row, item in enumerate(items):  # padding changes nothing
        alone = objective.terms(collate_for_classifier([item], pad_token_id=0, token_type_ids=False))
        assert torch.allclose(alone.total[0], terms.total[row], rtol=1e-4)
