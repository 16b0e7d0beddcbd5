import pytest
import torch
from torch import Tensor, nn

from tests.toys import normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.sparse import SparseDirections

KEYS = [HashKey(3, Domain.DIRECTION, 0, probe) for probe in range(3)]
SHAPES = {"b": (70_000,), "a": (3, 5), "c": (30, 21), "d": (4,), "e": (3, 5)}


def parameters(dtype: torch.dtype = torch.float32) -> TrainableParameters:
    module = nn.Module()
    for seed, (name, shape) in enumerate(SHAPES.items()):
        module.register_parameter(name, nn.Parameter((1 + seed) * normal(*shape, seed=seed, dtype=dtype)))
    return TrainableParameters(module)


def build(owner: TrainableParameters, *, quantile: float = 0.25, distribution="gaussian") -> SparseDirections:
    return SparseDirections(owner, quantile=quantile, distribution=distribution, compile_kernels=False)


def masks(owner: TrainableParameters, thresholds: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().abs() <= each for tensor, each in zip(owner.tensors, thresholds, strict=True)]


def quantiles(owner: TrainableParameters, quantile: float) -> list[Tensor]:
    magnitudes = (tensor.detach().double().abs() for tensor in owner.tensors)
    return [torch.quantile(each, quantile, interpolation="lower") for each in magnitudes]


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantile", [0.25, 0.8])
def test_the_smaller_weights_of_each_tensor_move_as_in_a_full_direction(dtype, quantile) -> None:
    owner = parameters(dtype)
    moved, full = owner.copy(), owner.copy()
    rounding = HashKey(3, Domain.ROUNDING, 0, 0)
    coefficients = torch.tensor([0.5, -0.25, 2.0])
    build(owner, quantile=quantile).axpy_(moved, coefficients, KEYS, rounding=rounding)
    HashedDirections(owner, distribution="gaussian").axpy_(full, coefficients, KEYS, rounding=rounding)
    for mask, old, new, dense in zip(masks(owner, quantiles(owner, quantile)), owner.tensors, moved, full, strict=True):
        assert torch.equal(new, torch.where(mask, dense, old))
        assert 0 < mask.sum() < mask.numel()


def test_the_mask_is_that_of_the_sources_and_follows_them() -> None:
    owner = parameters()
    thresholds = quantiles(owner, 0.25)
    directions = build(owner)
    with torch.no_grad():
        for tensor in owner.tensors:
            tensor.add_(0.3)
    first, second = ([torch.empty_like(tensor) for tensor in owner.tensors] for _ in range(2))
    directions.axpy_(first, torch.ones(1), KEYS[:1], sources=owner.tensors)
    for mask, old, new in zip(masks(owner, thresholds), owner.tensors, first, strict=True):
        assert torch.equal(new != old, mask)
    with torch.no_grad():
        kept = owner.copy()
        for tensor in owner.tensors:
            tensor.mul_(100)  # as while a probe point is held
    directions.axpy_(second, torch.ones(1), KEYS[:1], sources=kept)
    assert torch.equal(flat(first), flat(second))


def test_a_gradient_has_the_mask_of_the_parameters() -> None:
    owner = parameters()
    directions = build(owner)
    gradients = [torch.full_like(tensor, 7) for tensor in owner.tensors]
    scales = [0.0] * len(gradients)
    directions.axpy_(gradients, torch.tensor([0.5]), KEYS[:1], scales=scales, sources=owner.tensors)
    full = [torch.zeros_like(tensor) for tensor in owner.tensors]
    HashedDirections(owner, distribution="gaussian").axpy_(full, torch.tensor([0.5]), KEYS[:1])
    for mask, gradient, dense in zip(masks(owner, quantiles(owner, 0.25)), gradients, full, strict=True):
        assert torch.equal(gradient, torch.where(mask, dense, 0.0))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_dots_and_gram_equal_dense_arithmetic(distribution) -> None:
    owner = parameters()
    directions = build(owner, distribution=distribution)
    rows = []
    for key in KEYS:
        dense = [torch.empty_like(tensor) for tensor in owner.tensors]
        directions.axpy_(dense, torch.ones(1), [key], scales=[0.0] * len(dense), sources=owner.tensors)
        rows.append(flat(dense).double())
    z = torch.stack(rows)
    gradient = [normal(*tensor.shape, seed=9) for tensor in owner.tensors]
    assert torch.allclose(directions.dots(gradient, KEYS), z @ flat(gradient), rtol=1e-9)
    assert torch.allclose(directions.gram(KEYS), z @ z.T, rtol=1e-9)
    count = sum(int(mask.sum()) for mask in masks(owner, quantiles(owner, 0.25)))
    if distribution == "rademacher":
        assert directions.gram(KEYS[:1]).item() == count


def test_rows_are_those_of_the_whole() -> None:
    owner = parameters(torch.bfloat16)
    directions, rounding = build(owner), HashKey(3, Domain.ROUNDING, 0, 0)
    out = [torch.empty_like(tensor) for tensor in owner.tensors]
    directions.axpy_(out, torch.ones(1), KEYS[:1], sources=owner.tensors, rounding=rounding)
    rows, index = torch.tensor([7, 2, 7]), owner.names.index("c")
    values = owner.tensors[index].detach()[rows]
    some = directions.displaced_rows(
        values, rows, index=index, coefficients=torch.ones(1), keys=KEYS[:1], rounding=rounding
    )
    assert torch.equal(some, out[index][rows])
    assert not torch.equal(some, values)


def test_thresholds_stay_those_of_the_start() -> None:
    owner = parameters()
    first = build(owner)
    with torch.no_grad():
        for tensor in owner.tensors:
            tensor.mul_(0.5)
    resumed = build(owner)
    fresh, expected, actual = owner.copy(), owner.copy(), owner.copy()
    resumed.axpy_(fresh, torch.ones(1), KEYS[:1])
    resumed.load_state_dict(first.state_dict())
    first.axpy_(expected, torch.ones(1), KEYS[:1])
    resumed.axpy_(actual, torch.ones(1), KEYS[:1])
    assert torch.equal(flat(actual), flat(expected))
    assert not torch.equal(flat(actual), flat(fresh))


@pytest.mark.parametrize("values", [torch.zeros(4, 3), torch.tensor([0.5, -0.5])])
def test_a_constant_tensor_is_refused_by_name(values: Tensor) -> None:
    module = nn.ParameterDict({"lora_A": nn.Parameter(normal(4, 3, seed=0)), "lora_B": nn.Parameter(values)})
    with pytest.raises(UsageError, match=r"all of lora_B have the magnitude 0(\.5)?; leave it out with model\.freeze"):
        build(TrainableParameters(module))
