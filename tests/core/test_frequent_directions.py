import pytest
import torch
from torch import Tensor, nn

from tests.toys import normal
from vamo_ft.core.frequent_directions import FrequentDirections, inner_products
from vamo_ft.core.parameters import TrainableParameters

SHAPES = [(5, 6), (7,), (1, 3)]
NUMEL = 40


def parameters() -> TrainableParameters:
    return TrainableParameters(nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES]))


def cut(vector: Tensor) -> list[Tensor]:
    sizes = [int(torch.tensor(shape).prod()) for shape in SHAPES]
    return [part.view(shape) for part, shape in zip(vector.split(sizes), SHAPES, strict=True)]


def flat(rows: list[Tensor]) -> Tensor:
    return torch.cat([row.flatten(1) for row in rows], dim=1).double()


def centred(gradients: Tensor) -> Tensor:
    """What the sketch is about: each gradient less the running mean (decay 0.9) of those before it."""
    mean, result = gradients[0], []
    for gradient in gradients[1:]:
        result.append(gradient - mean)
        mean = 0.9 * mean + 0.1 * gradient
    return torch.stack(result)


def noisy_low_rank(count: int) -> Tensor:
    scales = torch.tensor([8.0, 5.0, 3.0], dtype=torch.float64)
    return (normal(count, 3, seed=1) * scales) @ normal(3, NUMEL, seed=2) / NUMEL**0.5 + 0.3 * normal(
        count, NUMEL, seed=3
    )


def sketched(gradients: Tensor, *, size: int) -> FrequentDirections:
    sketch = FrequentDirections(parameters(), size=size)
    for gradient in gradients:
        sketch.insert(cut(gradient.float()))
    return sketch


@pytest.mark.parametrize("size", [4, 6])
@pytest.mark.parametrize("count", [9, 60])
def test_the_sketch_keeps_what_its_theorem_says(size: int, count: int) -> None:
    gradients = noisy_low_rank(count)
    rows = centred(gradients)
    state = sketched(gradients, size=size).state_dict()
    kept = flat(state["rows"])
    assert state["filled"] <= 2 * size
    gap = torch.linalg.eigvalsh(rows.T @ rows - kept.T @ kept)
    spectrum = torch.linalg.svdvals(rows).square()
    bound = min(float(spectrum[rank:].sum()) / (size - rank) for rank in range(size))
    assert gap.min() >= -1e-4 * spectrum[0]
    assert gap.max() <= bound * (1 + 1e-4) + 1e-4
    if count > 2 * size + 1:
        assert gap.max() > 1e-3, "something was forgotten, or the test says nothing"


def test_few_gradients_are_kept_whole_and_their_leading_directions_are_those_of_the_svd() -> None:
    gradients = noisy_low_rank(9)
    basis = flat(sketched(gradients, size=4).leading(3))
    _, _, right = torch.linalg.svd(centred(gradients), full_matrices=False)
    assert torch.allclose((basis @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("count", [8, 9, 40, 41])
def test_the_leading_directions_are_orthonormal(count: int) -> None:
    basis = sketched(noisy_low_rank(count), size=6).leading(6)
    assert (inner_products(basis, basis) - torch.eye(6, dtype=torch.float64)).abs().max() < 1e-6
    assert [each.shape[1:] for each in basis] == [torch.Size(shape) for shape in SHAPES]


def test_directions_that_were_not_seen_are_zero() -> None:
    gradients = normal(1, NUMEL, seed=0) + normal(30, 2, seed=1) @ normal(2, NUMEL, seed=2)
    basis = sketched(gradients, size=4).leading(4)
    norms = inner_products(basis, basis).diagonal()
    assert torch.allclose(norms, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), atol=1e-6)


def test_it_finds_the_directions_of_the_noise_and_not_of_the_mean() -> None:
    mean = 100 * normal(NUMEL, seed=9)
    basis = flat(sketched(mean + noisy_low_rank(80), size=8).leading(3))
    signal, _ = torch.linalg.qr(normal(3, NUMEL, seed=2).T)
    assert ((basis @ signal).square().sum() / 3) > 0.95


def test_a_restored_sketch_goes_on_bit_for_bit() -> None:
    gradients = noisy_low_rank(40)
    whole, first = sketched(gradients, size=4), sketched(gradients[:17], size=4)
    second = FrequentDirections(parameters(), size=4)
    second.load_state_dict(first.state_dict())
    for gradient in gradients[17:]:
        second.insert(cut(gradient.float()))
    assert all(torch.equal(a, b) for a, b in zip(whole.leading(4), second.leading(4), strict=True))
    assert second.seen == 40
