"""Shares of the gradient noise, against dense arithmetic over all per-sample gradients."""

import pytest
import torch

from tests.toys import ExplicitDirections, NetworkObjective, SilentProgress, TinyNetwork, ToySource, normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.studies.captured import DirectionSet, GradientNoise, measure_gradient_noise

SAMPLES, WIDTH = 12, 10


def measured(objective: NetworkObjective, source: ToySource, sets: dict[str, DirectionSet]) -> GradientNoise:
    singles = [source.batch([index]) for index in range(source.num_samples)]
    owner = TrainableParameters(objective.module)
    return measure_gradient_noise(objective, owner, LocalRuntime(), singles, sets, progress=SilentProgress())


def keys(count: int) -> tuple[HashKey, ...]:
    return tuple(HashKey(3, Domain.DIRECTION, 0, probe) for probe in range(count))


@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_shares_equal_dense_projections_with_unequal_weights(dropout: float) -> None:
    source = ToySource(normal(SAMPLES, WIDTH, seed=1), batch_size=4, counts=torch.arange(SAMPLES) % 5 + 1.0)
    objective = NetworkObjective(TinyNetwork(WIDTH, dtype=torch.float64, dropout=dropout))
    owner = TrainableParameters(objective.module)
    rows = normal(3, owner.numel, seed=2)
    dependent = torch.cat([rows, rows[:1] + rows[1:2]])  # of rank 3
    sets = {
        "explicit": DirectionSet(ExplicitDirections(owner, dependent), keys(4)),
        "hashed": DirectionSet(HashedDirections(owner), keys(2)),
    }
    digest = owner.digest()
    found = measured(objective, source, sets)
    assert owner.digest() == digest
    assert all(tensor.grad is None for tensor in owner.tensors)

    objective.module.eval()
    gradients = []
    for index in range(SAMPLES):
        grads = torch.autograd.grad(objective.terms(source.batch([index])).total.sum(), owner.tensors)
        gradients.append(torch.cat([grad.reshape(-1) for grad in grads]))
    per_sample, weights = torch.stack(gradients), source.counts.double()
    mean = per_sample.sum(0) / weights.sum()
    noise = per_sample - weights[:, None] * mean
    hashed = torch.stack([sets["hashed"].directions.values(key, 0, owner.numel).double() for key in keys(2)])
    for name, z in (("explicit", rows), ("hashed", hashed)):
        basis, _ = torch.linalg.qr(z.T)
        expected = float((noise @ basis).square().sum() / noise.square().sum())
        assert 0 < expected < 1
        assert found.shares[name] == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(found.derivatives["explicit"], per_sample @ dependent.T, rtol=1e-10, atol=1e-12)
    assert torch.allclose(torch.cat([g.reshape(-1) for g in found.mean_gradient]), mean, rtol=1e-10, atol=1e-12)
    variance = float(noise.square().sum()) * SAMPLES / (SAMPLES - 1)
    signal = float(mean.square().sum()) - variance / float(weights.sum()) ** 2
    expected = signal * float(weights.square().sum()) / variance
    assert found.signal_to_noise == pytest.approx(expected, rel=1e-9)


def test_isotropic_directions_capture_their_share_of_the_dimensions() -> None:
    source = ToySource(normal(SAMPLES, WIDTH, seed=1, dtype=torch.float32), batch_size=4)
    objective = NetworkObjective(TinyNetwork(WIDTH))
    directions = HashedDirections(TrainableParameters(objective.module))
    shares = []
    for step in range(25):
        chosen = tuple(HashKey(3, Domain.DIRECTION, step, probe) for probe in range(4))
        shares.append(measured(objective, source, {"z": DirectionSet(directions, chosen)}).shares["z"])
    assert sum(shares) / len(shares) == pytest.approx(4 / 33, rel=0.25)
