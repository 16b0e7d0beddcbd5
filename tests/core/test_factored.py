import math

import pytest
import torch
from torch import Tensor, nn

from tests.toys import normal
from vamo_ft.core import factored
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.factored import FactoredDirections, LowRankDirections, SubspaceDirections
from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rounding import stochastically_rounded

SHAPES = {"b": (60, 40), "a": (7,), "c": (5, 3, 4), "d": (2, 70_000), "e": (90, 33)}
RANK, EVERY = 4, 5
STRUCTURES = (LowRankDirections, SubspaceDirections)


def key(step: int, probe: int = 0, *, seed: int = 3) -> HashKey:
    return HashKey(seed, Domain.DIRECTION, step, probe)


def parameters(dtype: torch.dtype = torch.float32, names: str = "badce") -> TrainableParameters:
    module = nn.Module()
    for name in names:
        shape = SHAPES[name]
        module.register_parameter(name, nn.Parameter(normal(*shape, seed=shape[0], dtype=dtype)))
    return TrainableParameters(module)


def build(structure: type[FactoredDirections], owner: TrainableParameters) -> FactoredDirections:
    return structure(owner, rank=RANK, refresh_every=EVERY, compile_kernels=False)


def dense(
    directions: FactoredDirections, each: HashKey, *, dtype: torch.dtype = torch.float32, names: str = "badce"
) -> dict[str, Tensor]:
    """The direction, formed whole."""
    owner = parameters(dtype, names)
    out = [torch.zeros_like(tensor) for tensor in owner.tensors]
    directions.axpy_(out, torch.ones(1), [each])
    return dict(zip(owner.names, out, strict=True))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)]).double()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_matrices_have_the_rank_and_vectors_a_plain_direction(structure) -> None:
    owner = parameters()
    z = dense(build(structure, owner), key(2))
    ranks = {name: int(torch.linalg.matrix_rank(z[name].flatten(0, -2).double(), rtol=1e-5)) for name in "bcde"}
    assert ranks == {"b": 4, "c": 4, "d": 2, "e": 4}
    plain = [torch.zeros_like(tensor) for tensor in owner.tensors]
    HashedDirections(owner, distribution="gaussian").axpy_(plain, torch.ones(1), [key(2)])
    assert torch.equal(z["a"], plain[0])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_unit_rms_over_the_draw_of_the_factors(structure, distribution) -> None:
    owner = parameters(names="bace")
    directions = structure(owner, rank=RANK, refresh_every=1, distribution=distribution, compile_kernels=False)
    draws = 200
    directions_drawn = [dense(directions, key(step), names="bace").values() for step in range(draws)]
    squares = torch.stack([torch.stack([z.square().mean() for z in each]) for each in directions_drawn])
    error = squares.std(0) / math.sqrt(draws)
    assert ((squares.mean(0) - 1).abs() <= 5 * error + 1e-4).all()
    assert (error < 0.08).all()


def row_space(z: Tensor) -> Tensor:
    """(n, n) projector on the span of the rows."""
    _, values, right = torch.linalg.svd(z.double(), full_matrices=False)
    right = right[values > 1e-5 * values[0]]
    return right.T @ right


def test_the_right_factor_of_low_rank_is_kept_and_the_left_one_is_not() -> None:
    directions = build(LowRankDirections, parameters())
    first, second, later = (dense(directions, key(step))["b"] for step in (5, 9, 10))
    assert torch.allclose(row_space(first), row_space(second), atol=1e-5)
    assert not torch.allclose(row_space(first), row_space(later), atol=0.1)
    assert not torch.allclose(row_space(first.T), row_space(second.T), atol=0.1)
    other_probe = dense(directions, key(5, 1))["b"]
    assert not torch.allclose(row_space(first), row_space(other_probe), atol=0.1)


def test_both_spaces_of_a_subspace_are_kept_and_its_core_is_not() -> None:
    directions = build(SubspaceDirections, parameters())
    first, second, later = (dense(directions, key(step))["e"] for step in (5, 9, 10))
    for left, right in ((first, second), (first.T, second.T)):
        assert torch.allclose(row_space(left), row_space(right), atol=1e-5)
    for left, right in ((first, later), (first.T, later.T)):
        assert not torch.allclose(row_space(left), row_space(right), atol=0.1)
    cosine = (first * second).sum() / (first.norm() * second.norm())
    assert cosine.abs() < 0.95


def test_the_core_of_a_subspace_has_independent_normal_elements() -> None:
    """With U and V orthonormal, U^T Z V is the scaled core; its norm says so without knowing U and V."""
    owner = parameters(names="b")
    directions = SubspaceDirections(owner, rank=RANK, refresh_every=10**6, compile_kernels=False)
    rows = torch.stack([flat(dense(directions, key(step), names="b")) for step in range(300)])
    _, values, _ = torch.linalg.svd(rows, full_matrices=False)
    spread = values[: RANK**2].square() / 300 * RANK**2 / 2400  # variances of 16 elements along principal axes
    assert values[RANK**2] < 1e-4 * values[0]
    assert 0.5 < spread.min() < spread.max() < 1.6


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("chunk", [1 << 22, 1000])
def test_axpy_dots_and_gram_equal_dense_arithmetic(structure, chunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored, "_CHUNK", chunk)
    owner = parameters()
    directions = build(structure, owner)
    keys = [key(3, probe) for probe in range(3)]
    z = torch.stack([flat(dense(directions, each)) for each in keys])
    values = torch.cat([tensor.detach().reshape(-1) for tensor in owner.tensors]).double()
    assert torch.allclose(directions.dots(owner.tensors, keys), z @ values, rtol=1e-5, atol=1e-2)
    assert torch.allclose(directions.gram(keys), z @ z.T, rtol=1e-5, atol=1e-2)
    without = [None if index == 3 else tensor for index, tensor in enumerate(owner.tensors)]
    zeroed = torch.cat([(t if i != 3 else 0 * t).detach().reshape(-1) for i, t in enumerate(owner.tensors)]).double()
    assert torch.allclose(directions.dots(without, keys), z @ zeroed, rtol=1e-5, atol=1e-2)

    coefficients, scales = torch.tensor([0.5, -0.25, 2.0], dtype=torch.float64), [1.0, 0.5, 0.25, 0.75, 0.125]
    moved = owner.copy()
    directions.axpy_(moved, coefficients, keys, scales=scales)
    factors = torch.cat([torch.full((t.numel(),), s) for t, s in zip(owner.tensors, scales, strict=True)])
    expected = values * factors + coefficients @ z
    assert torch.allclose(torch.cat([t.reshape(-1) for t in moved]).double(), expected, atol=2e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_part_of_the_tensors_gets_its_part_of_the_direction(structure) -> None:
    owner = parameters()
    whole = [torch.empty_like(tensor) for tensor in owner.tensors]
    build(structure, owner).axpy_(whole, torch.tensor([0.1]), [key(4)], sources=owner.tensors)
    part = [torch.empty_like(owner.tensors[index]) for index in (4, 0, 2)]
    sources = [owner.tensors[index] for index in (4, 0, 2)]
    build(structure, owner).axpy_(part, torch.tensor([0.1]), [key(4)], sources=sources, indices=(4, 0, 2))
    assert all(torch.equal(tensor, whole[index]) for tensor, index in zip(part, (4, 0, 2), strict=True))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rounding_takes_the_bits_of_the_elements_offsets(structure, dtype) -> None:
    owner = parameters(dtype)
    directions, rounding = build(structure, owner), HashKey(3, Domain.ROUNDING, 4, 1)
    z = dense(directions, key(4), dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    moved = owner.copy()
    directions.axpy_(moved, torch.tensor([0.01], dtype=torch.float64), [key(4)], rounding=rounding)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for name, offset, old, new in zip(owner.names, owner.offsets, owner.tensors, moved, strict=True):
        exact = old.detach().to(wide) + z[name].to(wide) * 0.01
        if dtype == torch.float64:
            assert torch.allclose(new, exact, rtol=1e-6)
            continue
        bits = random_bits(rounding, offset, offset + old.numel(), device=torch.device("cpu")).view(old.shape)
        share = (new == stochastically_rounded(exact, bits, dtype)).float().mean()
        assert share > 0.998, "products formed in another order differ in the last bit, and then seldom in the rounding"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_directions_are_functions_of_the_key_alone(structure) -> None:
    """What was asked before, as before a stop, does not show."""
    owner = parameters()
    used = build(structure, owner)
    for step in (0, 7, 3, 12):
        dense(used, key(step, step % 2))
    for each in (key(12), key(3, 1), key(7)):
        assert torch.equal(flat(dense(used, each)), flat(dense(build(structure, owner), each)))
    assert not torch.equal(flat(dense(used, key(3))), flat(dense(used, key(3, seed=4))))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_autocast_does_not_reach_the_products(structure) -> None:
    """Layers are displaced inside forward passes."""
    owner = parameters()
    expected = flat(dense(build(structure, owner), key(1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flat(dense(build(structure, owner), key(1))), expected)


@pytest.mark.parametrize("name", ["b", "c"])
def test_a_transposed_tensor_is_displaced_element_by_element(name: str) -> None:
    owner, contiguous = parameters(), parameters()
    tensor = owner.tensors[owner.names.index(name)]
    tensor.data = tensor.detach().transpose(0, 1).contiguous().transpose(0, 1)
    for each in (owner, contiguous):
        build(LowRankDirections, each).axpy_(each.tensors, torch.ones(1), [key(0)])
    assert not tensor.is_contiguous()
    assert owner.digest() == contiguous.digest()
