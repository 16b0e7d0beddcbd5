import pytest
import torch

from tests.toys import TinyNetwork
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import perturbed, placed_at

KEY = HashKey(1, Domain.DIRECTION, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_come_back_bit_for_bit(dtype, fails):
    parameters = TrainableParameters(TinyNetwork(50, dtype=dtype))
    directions = HashedDirections(parameters, distribution="gaussian")
    before = parameters.digest()
    for attempt in range(20):
        try:
            with perturbed(parameters, directions, key=KEY._replace(step=attempt), coefficient=1e-2):
                assert parameters.digest() != before
                if fails:
                    raise ArithmeticError
        except ArithmeticError:
            pass
        assert parameters.digest() == before


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_the_probe_point_is_x_plus_eps_z(distribution):
    parameters = TrainableParameters(TinyNetwork(50))
    directions = HashedDirections(parameters, distribution=distribution)
    z = directions.values(KEY, 0, parameters.numel)
    x = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])
    with perturbed(parameters, directions, key=KEY, coefficient=-1e-2):
        point = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])
    assert torch.allclose(point, x - 1e-2 * z, atol=1e-7)


def test_bfloat16_probe_points_move_by_eps_z_in_the_mean():
    """With nearest rounding a weight of 0.6 would not move at all at eps 1e-3."""
    network = TinyNetwork(20_000, dtype=torch.bfloat16)
    with torch.no_grad():
        network.layer.weight.fill_(0.6)
    parameters = TrainableParameters(network)
    directions = HashedDirections(parameters)
    z = torch.zeros_like(network.layer.weight, dtype=torch.float32)
    others = [torch.zeros_like(network.layer.bias, dtype=torch.float32), z]
    directions.axpy_(others, torch.tensor([1.0]), [KEY])
    old = network.layer.weight.detach().float()
    with perturbed(parameters, directions, key=KEY, coefficient=1e-3):
        moved = network.layer.weight.detach().float() - old
    assert (moved * z).mean() == pytest.approx(1e-3, rel=0.05)


def test_placed_at_writes_the_values_and_restores():
    network = TinyNetwork(50)
    parameters = TrainableParameters(network)
    before = parameters.digest()
    with placed_at(parameters, [torch.zeros_like(tensor) for tensor in parameters.tensors]):
        assert not network.layer.weight.any()
    assert parameters.digest() == before
