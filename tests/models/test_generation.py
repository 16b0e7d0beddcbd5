"""Greedy answers against a loop of plain forward passes, one unpadded row at a time and without a cache."""

import logging

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tests.tiny import byte_tokenizer, pair, tiny_gpt2, tiny_llama
from vamo_ft.config.model import AdapterConfig, ModelConfig
from vamo_ft.data.collation import collate_for_generation
from vamo_ft.models.adapters import add_adapter
from vamo_ft.models.export import quietly
from vamo_ft.models.generation import greedy_decoder, text_decoder

PROMPTS = ["q", "a longer prompt", "some", "the longest prompt of them all"]
EOS, PAD = 2, 0


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text)["input_ids"])


def greedy_loop(model: PreTrainedModel, prompt: tuple[int, ...], *, max_new_tokens: int) -> list[int]:
    sequence = list(prompt)
    while len(sequence) < len(prompt) + max_new_tokens and (len(sequence) == len(prompt) or sequence[-1] != EOS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1]
        sequence.append(int(logits.argmax()))
    return sequence[len(prompt) :]


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights, so that answers are varied and no two logits are close, and end-of-text comes up now and then."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(25)
    model.config.use_cache = False
    return model


def ending_early(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the second token of the first prompt's answer the end-of-text token, by swapping rows of the head."""
    second = greedy_loop(model, ids(PROMPTS[0]), max_new_tokens=2)[1]
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[[EOS, second]] = weight[[second, EOS]]
    return model


@pytest.fixture(params=["llama", "gpt2", "lora"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param == "gpt2":
        return ending_early(spread(tiny_gpt2()))
    if request.param == "llama":
        return ending_early(spread(tiny_llama()))
    adapter = AdapterConfig(type="lora", r=2, target_modules=["v_proj"])
    with quietly(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_adapter(spread(tiny_llama()), ModelConfig(path="x", adapter=adapter), modules_to_save=[]).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return ending_early(model)


def test_answers_equal_the_loop(model: PreTrainedModel) -> None:
    examples = [pair(index, ids(prompt), ids("x"), None) for index, prompt in enumerate(PROMPTS)]
    targets = collate_for_generation(examples, pad_token_id=PAD, position_ids=True).targets
    answers = greedy_decoder(model, byte_tokenizer(), max_new_tokens=9)(targets["prompt_ids"], targets["prompt_mask"])
    expected = [greedy_loop(model, ids(prompt), max_new_tokens=9) for prompt in PROMPTS]
    width = max(map(len, expected))
    assert answers.tolist() == [row + [PAD] * (width - len(row)) for row in expected]
    assert len(expected[0]) == 2 and width == 9  # one stops early, one does not
    assert len({tuple(row) for row in expected}) == len(expected)


def test_a_cache_is_used_and_stays_off_elsewhere() -> None:
    model = spread(tiny_llama())
    widths = []
    model.model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    prompt = torch.tensor([ids("some prompt")])
    greedy_decoder(model, byte_tokenizer(), max_new_tokens=3)(prompt, torch.ones_like(prompt))
    assert widths == [11, 1, 1]
    assert model.config.use_cache is False


def test_the_token_that_ends_a_turn_ends_the_answer() -> None:
    model = spread(tiny_llama())
    prompt = torch.tensor([ids("some prompt")])
    expected = greedy_loop(model, ids("some prompt"), max_new_tokens=8)
    end = expected[3]
    generate = greedy_decoder(model, byte_tokenizer(), max_new_tokens=8, end_of_turn=end)
    assert generate(prompt, torch.ones_like(prompt)).tolist() == [expected[: expected.index(end) + 1]]


def test_logits_exist_for_the_last_token_alone() -> None:
    """With the prompts' logits, a batch of long prompts would need more memory than the model."""
    model = spread(tiny_llama())
    widths = []
    model.lm_head.register_forward_pre_hook(lambda m, inputs: widths.append(inputs[0].shape[1]))
    examples = [pair(index, ids(prompt), ids("x")) for index, prompt in enumerate(PROMPTS)]
    targets = collate_for_generation(examples, pad_token_id=PAD, position_ids=True).targets
    answers = greedy_decoder(model, byte_tokenizer(), max_new_tokens=3)(targets["prompt_ids"], targets["prompt_mask"])
    assert widths == [1] * answers.shape[1]


def test_the_models_own_generation_settings_are_left_aside(caplog: pytest.LogCaptureFixture) -> None:
    model = spread(tiny_llama())
    prompt = torch.tensor([ids("some prompt")])
    generate = greedy_decoder(model, byte_tokenizer(), max_new_tokens=8)
    expected = greedy_loop(model, ids("some prompt"), max_new_tokens=8)
    own = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=7,
        repetition_penalty=9.0,
        eos_token_id=expected[0],
        max_length=4,
        num_beams=2,
    )
    model.generation_config = own
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        answers = [generate(prompt, torch.ones_like(prompt)).tolist() for _ in range(2)]
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert answers == [[expected]] * 2
    assert model.generation_config is own
    assert caplog.records == []


def test_texts_have_no_special_tokens() -> None:
    assert text_decoder(byte_tokenizer())([[*ids(" Paris"), EOS, PAD, PAD], [EOS], []]) == [" Paris", "", ""]
