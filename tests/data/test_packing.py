import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tests.tiny import VOCABULARY, tiny_gpt2
from vamo_ft.data.collation import collate_for_language_model, collate_packed
from vamo_ft.data.examples import Example, TokenizedData, TokenWriter
from vamo_ft.data.packing import pack
from vamo_ft.objectives.causal_lm import CausalLM

LAYERS = ["sliding_attention", "full_attention"]


def drawn(count: int, *, longest: int = 12, seed: int = 0) -> TokenizedData:
    """Documents of which one or two runs are learnt."""
    draw, writer = random.Random(seed), TokenWriter()
    for _ in range(count):
        length = draw.randrange(2, longest + 1)
        tokens = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        last = draw.randrange(1, length)
        first = ((1, draw.randrange(2, last)),) if last > 2 and draw.random() < 0.5 else ()
        writer.append(tokens, (*first, (last, length)))
    return writer.finish()


def documents_of(example: Example) -> list[Example]:
    """The documents of a packed sample, cut out again."""
    edges = [0, *(example.documents or (len(example.token_ids),))]
    return [
        Example(
            example.index,
            example.token_ids[start:end],
            tuple((a - start, b - start) for a, b in example.supervised if start <= a < end),
        )
        for start, end in pairwise(edges)
    ]


@pytest.mark.parametrize("max_length", [12, 13, 20, 64])
def test_packed_samples_hold_every_document_once_and_whole(max_length: int) -> None:
    data = drawn(97)
    packed = pack(data, max_length=max_length)
    found = [
        (row, document.token_ids, document.supervised)
        for index in range(len(packed))
        for row, document in zip(packed.rows_of(index), documents_of(packed[index]), strict=True)
    ]
    assert sorted(found) == [(index, data[index].token_ids, data[index].supervised) for index in range(97)]
    assert all(packed.length(index) <= max_length for index in range(len(packed)))
    rows = [packed.rows_of(index) for index in range(len(packed))]
    assert rows == sorted(rows) and all(list(row) == sorted(row) for row in rows)
    assert pack(data, max_length=max_length).fingerprint == packed.fingerprint


def reference(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every bin, with the room that each has had for longest first."""
    bins: list[tuple[int, int, list[int]]] = []  # room, since when, members
    for time, index in enumerate(sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))):
        fitting = [each for each in bins if each[0] >= lengths[index]]
        room, _, members = min(fitting, key=lambda each: each[:2], default=(capacity, 0, []))
        bins = [each for each in bins if each[2] is not members]
        bins.append((room - lengths[index], time, [*members, index]))
    return sorted(sorted(members) for _, _, members in bins)


@pytest.mark.parametrize("max_length", [12, 17, 40])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_best_fit_decreasing(max_length: int, seed: int) -> None:
    data = drawn(60, seed=seed)
    packed = pack(data, max_length=max_length)
    lengths = [data.length(index) for index in range(len(data))]
    assert [list(packed.rows_of(index)) for index in range(len(packed))] == reference(lengths, max_length)


def test_a_batch_by_hand() -> None:
    examples = [
        Example(0, (5, 6, 7, 8, 9), ((1, 2), (4, 5)), documents=(2, 5)),
        Example(1, (3, 4, 5), ((1, 3),)),
    ]
    batch = collate_packed(examples, pad_token_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.inputs.items()} == {
        "input_ids": [[5, 6, 7, 8], [0, 0, 3, 4]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 0, 1]],
    }
    assert batch.targets["positions"].tolist() == [0, 2, 3]
    assert batch.targets["tokens"].tolist() == [[6, -100, 9], [-100, 4, 5]]
    assert (batch.num_tokens, batch.num_supervised, batch.counts.tolist()) == (6, 4, [2, 2])


def windowed(kind: str, attention: str) -> PreTrainedModel:
    """Models with a sliding window of four tokens."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "attn_implementation": attention,
    }
    configs = {
        "mistral": MistralConfig(**shape, sliding_window=4),
        "qwen2": Qwen2Config(**shape, sliding_window=4, use_sliding_window=True, max_window_layers=1),
        "gemma3": Gemma3TextConfig(
            **shape, sliding_window=4, head_dim=8, layer_types=["sliding_attention", "full_attention"]
        ),
        "llama": LlamaConfig(**shape),
    }
    return AutoModelForCausalLM.from_config(configs[kind])


def models(kind: str, attention: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_gpt2() if kind == "gpt2" else windowed(kind, attention)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what is seen matters
    model.config.use_cache = False
    return model.eval()


def losses(model: PreTrainedModel, examples: list[Example], *, packed: bool) -> Tensor:
    batch = (
        collate_packed(examples, pad_token_id=0)
        if packed
        else collate_for_language_model(examples, pad_token_id=0, position_ids=True)
    )
    with torch.no_grad():
        return CausalLM(model, accepts_logits_to_keep=True).token_log_probs(batch)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "qwen2", "gemma3"])
def test_packed_losses_are_those_of_the_documents_alone(kind: str, attention: str) -> None:
    model = models(kind, attention).double()
    packed = pack(drawn(14, seed=3), max_length=30)
    examples = [packed[index] for index in range(len(packed))]
    assert max(len(example.documents) for example in examples) >= 3
    assert len({len(example.token_ids) for example in examples}) > 1  # so that some row is padded
    together = losses(model, examples, packed=True).sum(1)
    alone = torch.stack(
        [sum(losses(model, [each], packed=False).sum() for each in documents_of(example)) for example in examples]
    )
    rounding = 1e-5 if attention == "eager" else 1e-9  # eager softmax is float32
    torch.testing.assert_close(together, alone, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3"])
def test_a_document_does_not_change_another_in_a_single_bit(kind: str, attention: str) -> None:
    model = models(kind, attention)
    rest = (7, 8, 9, 10, 11, 12)
    documents = [(5, 6, 7, 8), (200, 100, 50, 25)]
    padding = Example(1, tuple(range(40, 60)), ((1, 20),))
    rows = [
        losses(model, [Example(0, (*each, *rest), ((1, 4), (5, 10)), documents=(4, 10)), padding], packed=True)[0]
        for each in documents
    ]
    first, second = (row[row != 0] for row in rows)
    assert not torch.equal(first[:3], second[:3])
    assert torch.equal(first[3:], second[3:])
