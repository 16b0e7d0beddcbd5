from itertools import pairwise

import pytest
import torch

from tests.tiny import tiny_bert_classifier, tiny_gpt2, tiny_llama
from tests.toys import normal
from vamo_ft.config.model import ModelConfig
from vamo_ft.core.blocks import Block, BlockDirections, block_at, model_blocks
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.models.adapters import add_adapter
from vamo_ft.models.export import quietly


def key(step: int, probe: int = 0, *, seed: int = 3) -> HashKey:
    return HashKey(seed, Domain.DIRECTION, step, probe)


def visited(steps: int, *, order: str, num_blocks: int, seed: int = 3) -> list[int]:
    return [block_at(step, order=order, num_blocks=num_blocks, seed=seed) for step in range(steps)]


# Orders


def test_random_permutation_visits_every_block_once_in_a_cycle_and_in_another_order_each_time() -> None:
    cycles = {}
    for seed in (1, 2):
        steps = visited(40 * 9, order="random_permutation", num_blocks=9, seed=seed)
        cycles[seed] = [tuple(steps[first : first + 9]) for first in range(0, len(steps), 9)]
        assert all(sorted(cycle) == list(range(9)) for cycle in cycles[seed])
        assert len(set(cycles[seed])) == 40
    assert not set(cycles[1]) & set(cycles[2])


def test_each_block_stands_equally_often_at_each_place_of_a_permutation() -> None:
    steps = torch.tensor(visited(2000 * 5, order="random_permutation", num_blocks=5)).view(2000, 5)
    counts = torch.stack([(steps == block).sum(0) for block in range(5)])
    assert (counts - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_cyclic_and_flip_flop() -> None:
    assert visited(7, order="cyclic", num_blocks=3) == [0, 1, 2, 0, 1, 2, 0]
    assert visited(8, order="flip_flop", num_blocks=3) == [0, 1, 2, 2, 1, 0, 0, 1]
    assert visited(3, order="flip_flop", num_blocks=1) == [0, 0, 0]


def test_random_is_uniform_and_does_not_remember() -> None:
    steps = visited(7000, order="random", num_blocks=7)
    counts = torch.bincount(torch.tensor(steps), minlength=7)
    assert (counts - 1000).abs().max() < 5 * (7000 / 7 * 6 / 7) ** 0.5
    repeated = sum(first == second for first, second in pairwise(steps))
    assert repeated == pytest.approx(1000, abs=5 * (7000 / 7 * 6 / 7) ** 0.5)


# Blocks of a model


def lora(model: torch.nn.Module) -> torch.nn.Module:
    with quietly():
        return add_adapter(model, ModelConfig(path="org/name", adapter={"type": "lora", "r": 2}))


LLAMA = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")
MODELS = {
    "llama": (tiny_llama, (*LLAMA, "lm_head")),
    "llama_tied": (lambda: tiny_llama(tied=True), LLAMA),
    "gpt2": (
        tiny_gpt2,
        ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"),
    ),
    "lora": (lambda: lora(tiny_llama()), ("base_model.model.model.layers.0", "base_model.model.model.layers.1")),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_layers_and_the_modules_around_them(name: str) -> None:
    build, names = MODELS[name]
    model = build()
    parameters = TrainableParameters(model)
    blocks = model_blocks(model, parameters)
    assert tuple(block.name for block in blocks) == names
    assert sorted(index for block in blocks for index in block.indices) == list(range(len(parameters.tensors)))
    for block in blocks:
        assert block.indices == tuple(sorted(block.indices))
        assert all(parameters.names[index].startswith(f"{block.name}.") for index in block.indices)


def test_frozen_parts_are_in_no_block() -> None:
    model = tiny_bert_classifier()
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    for parameter in model.bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    parameters = TrainableParameters(model)
    blocks = model_blocks(model, parameters)
    assert [block.name for block in blocks] == ["bert.encoder.layer.1", "bert.pooler.dense", "classifier"]
    assert sum(len(block.indices) for block in blocks) == len(parameters.tensors)


def test_a_model_without_layers_is_cut_by_module() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1, bias=False))
    assert model_blocks(module, TrainableParameters(module)) == (Block("0", (0, 1)), Block("1", (2,)))
    alone = torch.nn.Linear(2, 3)
    assert model_blocks(alone, TrainableParameters(alone)) == (Block("model", (0, 1)),)


# Directions


def toy() -> tuple[TrainableParameters, HashedDirections, BlockDirections]:
    """Tensors a, b, c, d; blocks (c, b) and (a, d), in turn."""
    module = torch.nn.Module()
    for name, shape in [("b", (70_000,)), ("a", (3, 5)), ("c", (30, 21)), ("d", (4,))]:
        module.register_parameter(name, torch.nn.Parameter(normal(*shape, seed=shape[0], dtype=torch.float32)))
    parameters = TrainableParameters(module)
    hashed = HashedDirections(parameters, distribution="gaussian", compile_kernels=False)
    return parameters, hashed, BlockDirections(hashed, (Block("bc", (1, 2)), Block("ad", (0, 3))), order="cyclic")


@pytest.mark.parametrize("step", [0, 1])
def test_only_the_block_moves_and_moves_as_in_a_full_direction(step: int) -> None:
    parameters, hashed, directions = toy()
    keys, coefficients = [key(step), key(step, 1)], torch.tensor([0.5, -2.0])
    expected, moved = parameters.copy(), parameters.copy()
    hashed.axpy_(expected, coefficients, keys, scales=[0.5] * 4)
    directions.axpy_(moved, coefficients, keys, scales=[0.5] * 4)
    assert directions.support(keys) == ((1, 2), (0, 3))[step]
    for index, tensor in enumerate(moved):
        reached = index in directions.support(keys)
        assert torch.equal(tensor, expected[index] if reached else parameters.tensors[index])


def test_what_lies_outside_the_block_is_not_touched() -> None:
    """Neither tensors nor sources outside the block are asked for anything."""
    parameters, _, directions = toy()
    out = [torch.full_like(tensor, torch.nan) for tensor in parameters.tensors]
    sources = [parameters.tensors[0], None, None, parameters.tensors[3]]
    directions.axpy_(out, torch.tensor([0.1]), [key(1)], sources=sources)
    assert [bool(tensor.isnan().all()) for tensor in out] == [False, True, True, False]
    part = [torch.full_like(parameters.tensors[index], torch.nan) for index in (2, 3)]
    directions.axpy_(part, torch.tensor([0.1]), [key(1)], sources=[None, parameters.tensors[3]], indices=(2, 3))
    assert part[0].isnan().all()
    assert torch.equal(part[1], out[3])
    directions.axpy_(part[:1], torch.tensor([0.1]), [key(1)], indices=(2,))
    assert part[0].isnan().all()


@pytest.mark.parametrize("step", [0, 1])
def test_dots_and_gram_equal_dense_arithmetic(step: int) -> None:
    parameters, _, directions = toy()
    keys = [key(step, probe) for probe in range(3)]
    rows = []
    for each in keys:
        dense = [torch.zeros_like(tensor) for tensor in parameters.tensors]
        directions.axpy_(dense, torch.ones(1), [each])
        rows.append(torch.cat([tensor.reshape(-1) for tensor in dense]).double())
    z = torch.stack(rows)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors]).double()
    assert torch.allclose(directions.dots(parameters.tensors, keys), z @ flat, rtol=1e-10)
    assert torch.allclose(directions.gram(keys), z @ z.T, rtol=1e-10)


def test_the_norm_of_signs_is_the_size_of_the_block() -> None:
    parameters, _, _ = toy()
    hashed = HashedDirections(parameters, compile_kernels=False)
    directions = BlockDirections(hashed, (Block("bc", (1, 2)), Block("ad", (0, 3))), order="cyclic")
    assert [directions.gram([key(step)]).item() for step in (0, 1)] == [70_630, 19]


def test_rows_of_the_block_are_those_of_the_whole() -> None:
    parameters, _, directions = toy()
    out = [torch.empty_like(tensor) for tensor in parameters.tensors]
    rounding = HashKey(3, Domain.ROUNDING, 0, 0)
    directions.axpy_(out, torch.tensor([0.1]), [key(0)], sources=parameters.tensors, rounding=rounding)
    rows = torch.tensor([7, 2, 7])
    some = directions.displaced_rows(
        parameters.tensors[2].detach()[rows],
        rows,
        index=2,
        coefficients=torch.tensor([0.1]),
        keys=[key(0)],
        rounding=rounding,
    )
    assert torch.equal(some, out[2][rows])
