import math

import pytest
import torch
from torch import nn

from tests.toys import normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rounding import count_finer_than_ulp, stochastically_rounded

DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")


def key(*, seed: int = 3, step: int = 0, probe: int = 0) -> HashKey:
    return HashKey(seed, Domain.DIRECTION, step, probe)


def vector(numel: int) -> TrainableParameters:
    return TrainableParameters(nn.ParameterList([nn.Parameter(torch.zeros(numel))]))


def several() -> nn.Module:
    """Parameters of uneven sizes that straddle block boundaries."""
    module = nn.Module()
    for name, shape in [("b", (70_000,)), ("a", (3, 5)), ("c", (300, 221)), ("d", (1,))]:
        module.register_parameter(name, nn.Parameter(normal(*shape, seed=len(name) + shape[0], dtype=torch.float32)))
    return module


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("vary", ["seed", "step", "probe"])
def test_neighbouring_keys_give_uncorrelated_directions(distribution, vary):
    """Normalised inner products of 96 neighbours have variance 1, as those of independent directions do."""
    numel = 4096
    directions = HashedDirections(vector(numel), distribution=distribution)
    rows = torch.stack([directions.values(key(**{vary: index}), 0, numel) for index in range(96)]).double()
    products = (rows @ rows.T)[torch.triu_indices(96, 96, 1).unbind()] / math.sqrt(numel)
    assert products.square().mean() == pytest.approx(1, abs=0.08)
    assert products.mean() == pytest.approx(0, abs=5 / math.sqrt(len(products)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("start", [0, 2**32 - 2**16, 2**32])
def test_sums_over_aligned_blocks_and_lags_look_independent(distribution, start):
    block, seeds, blocks = 4096, 96, 32
    directions = HashedDirections(vector(8), distribution=distribution)
    sums, products, lags = [], torch.zeros(5, dtype=torch.float64), (1, 2, 3, 64, 65536)
    for seed in range(seeds):
        row = directions.values(key(seed=seed), start, start + blocks * block).double()
        row = row / row.std()
        sums.append(row.view(blocks, block).sum(1) / math.sqrt(block))
        products += torch.stack([(row[lag:] * row[:-lag]).sum() for lag in lags])
    across = torch.stack(sums)  # (seeds, blocks)
    assert across.square().mean() == pytest.approx(1, abs=0.1)
    assert across.var(0).mean() == pytest.approx(1, abs=0.1)  # of a hash whose blocks ignore the seed: 0
    for lag, product in zip(lags, products, strict=True):
        assert abs(product) < 5 * math.sqrt(seeds * (blocks * block - lag))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions_keep_their_promises(distribution):
    numel = 300_000
    directions = HashedDirections(vector(numel), distribution=distribution)
    z = directions.values(key(), 0, numel).double()
    if distribution == "rademacher":
        assert set(z.unique().tolist()) == {-1.0, 1.0}
    else:
        assert z.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / numel))
        assert z.pow(4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / numel))
        assert (z.abs() > 4).sum() == pytest.approx(6.33e-5 * numel, abs=5 * math.sqrt(19))
    if distribution == "sphere":
        assert z.square().sum() == pytest.approx(numel, rel=1e-6)
    assert z.mean() == pytest.approx(0, abs=5 / math.sqrt(numel))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_axpy_dots_and_gram_equal_dense_arithmetic(distribution):
    module = several()
    parameters = TrainableParameters(module)
    assert parameters.names == ("a", "b", "c", "d")
    directions = HashedDirections(parameters, distribution=distribution)
    keys = [key(probe=probe) for probe in range(3)]
    rows = torch.stack([directions.values(each, 0, parameters.numel) for each in keys])
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])
    coefficients = torch.tensor([0.5, -0.25, 2.0])
    scales = [1.0, 0.5, 1.0, 0.25]
    per_element = torch.cat([torch.full((t.numel(),), s) for t, s in zip(parameters.tensors, scales, strict=True)])

    assert torch.allclose(directions.dots(parameters.tensors, keys), rows.double() @ flat.double(), rtol=1e-12)
    assert torch.allclose(directions.gram(keys), rows.double() @ rows.double().T, rtol=1e-6)
    directions.axpy_(parameters.tensors, coefficients, keys, scales=scales)
    moved = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])
    expected = flat.double() * per_element + coefficients.double() @ rows.double()
    assert torch.allclose(moved.double(), expected, atol=2e-6)


def test_none_among_the_tensors_stands_for_zeros():
    parameters = TrainableParameters(several())
    directions = HashedDirections(parameters)
    tensors = [tensor.detach() for tensor in parameters.tensors]
    with_zeros = directions.dots([tensors[0], torch.zeros_like(tensors[1]), *tensors[2:]], [key()])
    assert torch.equal(directions.dots([tensors[0], None, *tensors[2:]], [key()]), with_zeros)


def test_values_belong_to_offsets_not_to_tensors():
    """The same elements cut into other tensors get the same direction."""
    parameters = TrainableParameters(several())
    one = vector(parameters.numel)
    coefficients = torch.tensor([1.0])
    cut, whole = [torch.zeros_like(tensor) for tensor in parameters.tensors], [torch.zeros(parameters.numel)]
    HashedDirections(parameters).axpy_(cut, coefficients, [key()])
    HashedDirections(one).axpy_(whole, coefficients, [key()])
    assert torch.equal(torch.cat([tensor.reshape(-1) for tensor in cut]), whole[0])


def test_tied_parameters_count_once():
    module = nn.ModuleDict({"embedding": nn.Embedding(11, 4), "head": nn.Linear(4, 11, bias=False)})
    module["head"].weight = module["embedding"].weight
    assert TrainableParameters(module).numel == 44


def test_stochastic_rounding_is_exact_in_the_mean_and_rounds_to_neighbours():
    value = 1.0 + 0.3 * 2**-7  # three tenths of an ulp above 1
    values = torch.full((200_000,), value)
    bits = random_bits(HashKey(5, Domain.ROUNDING, 0, 0), 0, len(values), device=torch.device("cpu"))
    rounded = stochastically_rounded(values, bits, torch.bfloat16).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded > 1).double().mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / len(values)))
    exact = torch.tensor([0.0, -0.0, 1.5, -3.25, 65280.0])
    assert torch.equal(stochastically_rounded(exact, bits[:5], torch.bfloat16).float(), exact)


def test_updates_below_one_ulp_do_not_vanish_in_the_mean():
    parameters = TrainableParameters(nn.ParameterList([nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))]))
    directions = HashedDirections(parameters)
    steps, size = 200, 2e-5  # an ulp at 1 is 2**-7 above and 2**-8 below
    z = directions.values(key(), 0, 4096)
    for step in range(steps):
        rounding = HashKey(3, Domain.ROUNDING, step, 0)
        directions.axpy_(parameters.tensors, torch.tensor([size]), [key()], rounding=rounding)
    moved = (parameters.tensors[0].detach().float() - 1) @ z / 4096
    assert moved == pytest.approx(steps * size, rel=0.15)


def test_number_of_weights_whose_spacing_exceeds_eps():
    values = [0.0, 0.1, 0.24, 0.26, 0.9, 1.1, -1.1, 3.0]
    for dtype in (torch.bfloat16, torch.float32):
        tensor = torch.tensor(values, dtype=dtype)
        above = torch.nextafter(tensor, torch.full_like(tensor, torch.inf)) - tensor
        below = tensor - torch.nextafter(tensor, torch.full_like(tensor, -torch.inf))
        spacing = torch.maximum(above, below).float()
        for eps in (1e-9, 1e-7, 1e-3, 3e-3, 1e-2):
            expected = ((spacing > eps) & (tensor != 0)).sum().item()
            assert count_finer_than_ulp([tensor, tensor[:0]], eps) == expected
