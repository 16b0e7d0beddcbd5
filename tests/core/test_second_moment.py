"""`E[z z^T]` of every structure, against the mean over many drawn directions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.toys import normal
from vamo_ft.core.blocks import BlockDirections, model_blocks
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.factored import LowRankDirections, SubspaceDirections
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions
from vamo_ft.core.second_moment import SecondMoment
from vamo_ft.core.sparse import SparseDirections

DRAWS = 400


def module(*, vectors: bool = True) -> nn.Module:
    """Two layers, and with them matrices of two shapes."""
    part = nn.Module()
    part.layers = nn.ModuleList([nn.Linear(3, 3, bias=vectors), nn.Linear(3, 2, bias=vectors)])
    with torch.no_grad():
        for seed, parameter in enumerate(part.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed, dtype=torch.float32))
    return part


STRUCTURES: dict[str, Callable[[nn.Module, TrainableParameters], Directions]] = {
    "rademacher": lambda module, owner: HashedDirections(owner),
    "gaussian": lambda module, owner: HashedDirections(owner, distribution="gaussian"),
    "sphere": lambda module, owner: HashedDirections(owner, distribution="sphere"),
    "sparse": lambda module, owner: SparseDirections(owner, quantile=0.4),
    "low_rank": lambda module, owner: LowRankDirections(owner, rank=2, refresh_every=10**6),
    "subspace": lambda module, owner: SubspaceDirections(owner, rank=2, refresh_every=10**6),
}


def gradients(owner: TrainableParameters) -> list[Tensor]:
    return [normal(*tensor.shape, seed=50 + index) for index, tensor in enumerate(owner.tensors)]


def drawn(owner: TrainableParameters, directions: Directions, key: HashKey) -> Tensor:
    z = [torch.empty_like(tensor) for tensor in owner.tensors]
    with torch.no_grad():
        directions.axpy_(z, torch.ones(1), [key], scales=[0.0] * len(z), sources=owner.tensors)
    return torch.cat([tensor.reshape(-1) for tensor in z]).double()


@pytest.mark.parametrize(
    ("structure", "vectors"), [*((name, True) for name in STRUCTURES), ("low_rank", False), ("subspace", False)]
)
def test_the_moment_is_the_mean_over_draws(structure: str, vectors: bool) -> None:
    """V of low_rank, U and V of subspace, and the mask are the same in every draw."""
    part = module(vectors=vectors)
    owner = TrainableParameters(part)
    directions = STRUCTURES[structure](part, owner)
    given = gradients(owner)
    keys = [HashKey(5, Domain.DIRECTION, step, 0) for step in range(DRAWS)]
    z = torch.stack([drawn(owner, directions, key) for key in keys])
    g = torch.cat([gradient.reshape(-1) for gradient in given])
    actual = directions.second_moment(given, keys[:1])
    assert actual.trace == pytest.approx(float(z.square().sum() / DRAWS), rel=0.1)
    assert actual.quadratic == pytest.approx(float((z @ g).square().mean()), rel=0.25)
    assert actual.squared_norm == pytest.approx(float(g @ g), rel=1e-12)
    # the leading axis from one half of the draws, its variance from the other: the same half would overstate it
    first, second = z[::2], z[1::2]
    _, axes = torch.linalg.eigh(first.T @ first)
    assert actual.largest == pytest.approx(float((second @ axes[:, -1]).square().mean()), rel=0.25)
    assert actual.stable_rank == actual.trace / actual.largest
    assert actual.overlap == pytest.approx(actual.quadratic / actual.largest / float(g @ g), rel=1e-12)


def test_a_block_reaches_itself_and_nothing_else() -> None:
    part = module()
    owner = TrainableParameters(part)
    directions = BlockDirections(HashedDirections(owner), model_blocks(part, owner), order="cyclic")
    given = gradients(owner)
    by_name = directions.second_moments(given)
    assert [moment.stable_rank for moment in by_name.values()] == [12, 8]
    assert sum(moment.overlap for moment in by_name.values()) == pytest.approx(1)
    for step, name in enumerate(by_name):
        keys = [HashKey(3, Domain.DIRECTION, step, 0)]
        assert directions.second_moment(given, keys) == by_name[name]
        z = drawn_in_block(owner, directions, keys[0])
        g = torch.cat([gradient.reshape(-1) for gradient in given])
        assert by_name[name].quadratic == pytest.approx(float((g * z.abs()).square().sum()), rel=1e-12)


def drawn_in_block(owner: TrainableParameters, directions: BlockDirections, key: HashKey) -> Tensor:
    """Signs on the block, zeros elsewhere."""
    z = [torch.zeros_like(tensor) for tensor in owner.tensors]
    directions.axpy_(z, torch.ones(1), [key])
    return torch.cat([tensor.reshape(-1) for tensor in z]).double()


def test_informed_directions_reach_their_span() -> None:
    owner = TrainableParameters(module())
    directions = GradientSubspace(owner, size=3, warmup=4)
    for seed in range(8):
        directions.observe([normal(*tensor.shape, seed=90 + 5 * seed + i) for i, tensor in enumerate(owner.tensors)])
    directions.freeze()
    given = gradients(owner)
    keys = [HashKey(3, Domain.DIRECTION, 0, probe) for probe in range(3)]
    rows = torch.stack([drawn(owner, directions, key) for key in keys])
    g = torch.cat([gradient.reshape(-1) for gradient in given])
    projected, _ = torch.linalg.qr(rows.T)
    actual = directions.second_moment(given, keys)
    assert actual.stable_rank == 3
    assert actual.overlap == pytest.approx(float((projected.T @ g).square().sum() / (g @ g)), rel=1e-5)


def test_a_gradient_of_nothing_overlaps_with_nothing() -> None:
    part = module()
    owner = TrainableParameters(part)
    nothing = [None] * len(owner.tensors)
    for structure in STRUCTURES.values():
        moment = structure(part, owner).second_moment(nothing, [HashKey(3, Domain.DIRECTION, 0, 0)])
        assert isinstance(moment, SecondMoment)
        assert (moment.overlap, moment.quadratic) == (0, 0)
