import pytest
import torch
from torch import Tensor, nn

from tests.toys import normal
from vamo_ft.core import frequent_directions
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters

KEYS = [HashKey(1, Domain.DIRECTION, 4, probe) for probe in range(3)]
ROUNDING = HashKey(1, Domain.ROUNDING, 4, 0)


def subspace(dtype: torch.dtype = torch.float32, *, width: int = 6) -> tuple[GradientSubspace, TrainableParameters]:
    shapes = [(5, width), (7,)]
    module = nn.ParameterList([nn.Parameter(normal(*shape, seed=n, dtype=dtype)) for n, shape in enumerate(shapes)])
    parameters = TrainableParameters(module)
    directions = GradientSubspace(parameters, size=3, warmup=4)
    for step in range(6):
        assert directions.ready == (step >= 4)
        directions.observe(
            [normal(*p.shape, seed=10 * step + n, dtype=dtype) for n, p in enumerate(parameters.tensors)]
        )
    directions.freeze()
    return directions, parameters


def rows(directions: GradientSubspace) -> Tensor:
    return torch.cat([basis.flatten(1) for basis in directions.state_dict()["basis"]], dim=1).double()  # (k, d)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_displacement_products_and_gram_matrix(dtype: torch.dtype) -> None:
    directions, parameters = subspace(dtype)
    basis, before = rows(directions), flat(parameters.tensors)
    coefficients = torch.tensor([0.5, -2.0])
    chosen = [KEYS[2], KEYS[0]]
    with torch.no_grad():
        directions.axpy_(parameters.tensors, coefficients, chosen, scales=[0.5, 1.0])
    scale = torch.cat([torch.full((30,), 0.5), torch.ones(7)]).double()
    expected = scale * before + 0.5 * basis[2] - 2 * basis[0]
    assert torch.allclose(flat(parameters.tensors), expected, atol=1e-6)
    gradient = [normal(*p.shape, seed=77, dtype=dtype) for p in parameters.tensors]
    assert torch.allclose(directions.dots(gradient, chosen), basis[[2, 0]] @ flat(gradient), atol=1e-6)
    assert torch.allclose(directions.dots([gradient[0], None], KEYS), basis[:, :30] @ flat(gradient[:1]), atol=1e-6)
    assert torch.allclose(directions.gram(chosen), basis[[2, 0]] @ basis[[2, 0]].T, atol=1e-12)


def test_some_tensors_from_other_sources() -> None:
    directions, _parameters = subspace()
    source = normal(7, seed=5, dtype=torch.float32)
    out = torch.empty(7)
    directions.axpy_([out], torch.ones(1), [KEYS[1]], sources=[source], indices=[1])
    assert torch.allclose(out.double(), source.double() + rows(directions)[1, 30:], atol=1e-6)


def test_low_precision_moves_by_the_direction_in_the_mean() -> None:
    directions, _parameters = subspace(torch.bfloat16, width=4000)
    target = torch.full((5, 4000), 0.6, dtype=torch.bfloat16)
    moved = torch.zeros(5, 4000, dtype=torch.float64)
    for draw in range(64):
        out = torch.empty_like(target)
        directions.axpy_(
            [out],
            torch.tensor([0.05]),
            [KEYS[0]],
            sources=[target],
            indices=[0],
            rounding=ROUNDING._replace(step=draw),
        )
        moved += (out.double() - target.double()) / 64
    z = rows(directions)[0, :20_000].view(5, 4000)
    assert float((moved * z).sum() / z.square().sum()) == pytest.approx(0.05, rel=0.1)


def test_the_basis_stays_until_it_is_read_anew() -> None:
    directions, parameters = subspace()
    before = rows(directions)
    for step in range(5):
        directions.observe([normal(*p.shape, seed=99 + step, dtype=torch.float32) for p in parameters.tensors])
    assert torch.equal(rows(directions), before)
    directions.freeze()
    assert not torch.equal(rows(directions), before)


def test_the_memory_it_says_is_the_memory_it_takes() -> None:
    directions, parameters = subspace()
    state = directions.state_dict()
    tensors = [*state["basis"], *state["sketch"]["rows"], *state["sketch"]["mean"]]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert GradientSubspace.state_bytes(parameters.numel, 3) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(dtype: torch.dtype) -> None:
    """Forward passes displace their layers inside it."""
    directions, parameters = subspace(dtype)
    moved = []
    for enabled in (False, True):
        out = [torch.empty_like(tensor) for tensor in parameters.tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            directions.axpy_(out, torch.tensor([0.5]), KEYS[:1], sources=parameters.tensors, rounding=ROUNDING)
        moved.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_reading_a_basis_takes_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old basis is gone before the new one is formed, and that is mended one tensor at a time."""
    directions, _parameters = subspace()
    held = []
    combine = frequent_directions.combined

    def noted(weights: Tensor, vectors: Tensor) -> Tensor:
        held.append(len(directions.state_dict()["basis"]))
        return combine(weights, vectors)

    monkeypatch.setattr(frequent_directions, "combined", noted)
    directions.freeze()
    assert held == [0, 0, 0, 0], "formed, then mended, each tensor by itself"
