"""VAMO's adaptive coefficient, informed directions and refresh, and what low precision and interrupted passes keep."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.estimators.test_vamo import corrected, token_problem
from tests.toys import NetworkObjective, TinyNetwork, ToySource, build_vamo, exact_gradient, normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import StopRequested
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.estimators.vamo import AdaptiveRefresh, Vamo
from vamo_ft.objectives.synthetic import Quadratic


def few_dimensional() -> tuple[Quadratic, ToySource]:
    """Per-sample gradients that differ in a few dimensions only, and by a little in the others."""
    features = normal(64, 4, seed=1) @ normal(4, 60, seed=2) + 0.1 * normal(64, 60, seed=3)
    objective = Quadratic(torch.zeros(60, dtype=torch.float64), curvature=torch.ones(60))
    return objective, ToySource(features, batch_size=4)


def test_informed_directions_remove_the_noise_that_they_hold():
    objective, source = few_dimensional()
    directions = GradientSubspace(TrainableParameters(objective.module), size=4, warmup=12)
    vamo = build_vamo(objective, directions=directions, num_probes=4, eps=1e-2, alpha=1.0)
    assert all(vamo.prepare(source, step).forward_samples == 0 for step in range(1))
    for step in range(12):
        plain = exact_gradient(objective, source.batch(source.step_indices(step)))
        assert torch.allclose(corrected(vamo, source, step), plain, atol=1e-12), "nothing to correct with yet"
    mean = exact_gradient(objective, source.batch(range(64)))
    before = after = 0.0
    for step in range(12, 28):
        plain = exact_gradient(objective, source.batch(source.step_indices(step)))
        before += float((plain - mean).square().sum())
        after += float((corrected(vamo, source, step) - mean).square().sum())
    basis = torch.cat([rows.flatten(1) for rows in directions.state_dict()["basis"]], dim=1).double()
    noise = source.features - source.features.mean(0)
    held = float((noise @ basis.T).square().sum() / noise.square().sum())
    assert held > 0.9
    assert after / before == pytest.approx(1 - held, abs=0.05)


def test_a_fixed_alpha_needs_no_derivatives_of_the_step(monkeypatch):
    objective, source = token_problem()
    vamo = build_vamo(objective)
    monkeypatch.setattr(vamo._directions, "dots", None)
    assert torch.isfinite(corrected(vamo, source, 0)).all()


def test_the_adaptive_coefficient_is_that_of_the_steps_before(monkeypatch):
    """Against the slope recomputed from autograd's gradients and the explicit directions."""
    objective, source = few_dimensional()
    directions = HashedDirections(TrainableParameters(objective.module))
    vamo = build_vamo(objective, directions=directions, num_probes=8, alpha=None, eps=1e-2)
    vamo.prepare(source, 0)
    keys = vamo._snapshots.keys(vamo._snapshot)
    z = torch.stack([directions.values(key, 0, 60) for key in keys]).double()
    inverse = torch.linalg.inv(z @ z.T)
    full = exact_gradient(objective, source.batch(range(64)))
    mean, ab, bb = z @ full, 0.0, 0.0
    for step in range(40):
        plain = exact_gradient(objective, source.batch(source.step_indices(step)))
        actual = corrected(vamo, source, step)
        noise = z @ (plain - full)  # a quadratic: finite differences are exact
        alpha = 0.0 if step < 16 else min(max(ab / bb, 0.0), 1.0)
        # below 31 steps every bucket but that of age 15 to 30 has fewer than 16 updates
        if step < 31:
            assert torch.allclose(actual, plain - alpha * (z.T @ (inverse @ noise)), atol=1e-6)
        a = z @ plain
        ab = 0.98 * ab + 0.02 * float((a - mean) @ inverse @ noise)
        bb = 0.98 * bb + 0.02 * float(noise @ inverse @ noise)
        mean = 0.8 * mean + 0.2 * a


def test_an_adaptive_refresh_waits_for_a_low_correlation_and_for_the_budget():
    def snapshots(*, drift: float, budget: float) -> list[int]:
        objective, source = few_dimensional()
        vamo = build_vamo(
            objective,
            num_probes=4,
            alpha=None,
            eps=1e-2,
            snapshot_due=lambda step: step % 4 == 0,
            refresh=AdaptiveRefresh(min_correlation=0.5, budget=budget),
        )
        taken = []
        for step in range(240):
            if vamo.prepare(source, step).forward_samples:
                taken.append(step)
            batch = source.batch(source.step_indices(step))
            if drift:  # what the snapshot said of a sample is not what it is now
                source.features = source.features.roll(1, 0)
            vamo.estimate([batch], step)
        return taken

    assert snapshots(drift=0.0, budget=10.0) == [0], "the snapshot tells all there is along its directions"
    often = snapshots(drift=1.0, budget=1e9)
    assert len(often) > 5
    assert min(b - a for a, b in itertools.pairwise(often)) >= 16
    within = snapshots(drift=1.0, budget=2.0)
    assert 1 < len(within) < len(often)
    # a snapshot takes 8 * 64 forward passes, a step 4: two for one allow one more snapshot every 64 steps
    assert all(512 * (number + 1) <= 2.0 * 4 * step for number, step in enumerate(within[1:], start=1))


def test_the_adaptive_coefficient_of_a_raw_sum_is_not_that_of_a_projection():
    """Directions that are far from orthogonal: the raw sum over-corrects, and its best coefficient says by how much."""
    dimension, probes, samples = 60, 30, 64
    features = normal(samples, dimension, seed=3)
    objective = Quadratic(torch.zeros(dimension, dtype=torch.float64), curvature=torch.ones(dimension))
    source = ToySource(features, batch_size=1)
    directions = HashedDirections(TrainableParameters(objective.module))
    vamo = build_vamo(
        objective, directions=directions, num_probes=probes, alpha=None, eps=1e-2, orthogonalise=False, token_budget=64
    )
    vamo.prepare(source, 0)
    z = torch.stack([directions.values(key, 0, dimension) for key in vamo.keys]).double()
    noise = features - features.mean(0)
    sums = (noise @ z.T / dimension) @ z  # sum over unit directions
    best = float((noise * sums).sum() / sums.square().sum())
    assert best < 0.85
    for step in range(256):
        estimate = vamo.estimate([source.batch([step % samples])], step)
    assert float(estimate.metrics["alpha"]) == pytest.approx(best, abs=0.06)


def test_a_bfloat16_gradient_takes_the_correction_in_the_mean():
    """Rounded to nearest, most of a correction that is small beside the gradient's elements would be lost."""
    width = 3000
    objective = NetworkObjective(TinyNetwork(width, dtype=torch.bfloat16))
    source = ToySource(normal(24, width, seed=1, dtype=torch.bfloat16), batch_size=6)
    vamo = build_vamo(objective, alpha=1.0, eps=3e-2, num_probes=1)
    plain = build_vamo(objective, alpha=0.0, eps=3e-2, num_probes=1)
    landed, asked = 0.0, 0.0
    for step in range(8):
        vamo.prepare(source, 0)
        plain.prepare(source, 0)
        batch = source.batch(source.step_indices(step))
        uncorrected = corrected(plain, source, step).double()
        z = torch.cat([t.reshape(-1) for t in dense(vamo)]).double()
        weights = vamo.batch_noise([batch]).weights
        moved = uncorrected - corrected(vamo, source, step).double()
        landed += float(moved @ z) * float(weights.sign())
        asked += float(z @ z) * float(weights.abs())
    assert landed / asked == pytest.approx(1.0, abs=0.1)


def dense(vamo: Vamo) -> list[Tensor]:
    """The first direction, tensor by tensor."""
    tensors = [torch.zeros(t.shape) for t in vamo._parameters.tensors]
    vamo._directions.axpy_(tensors, torch.ones(1), vamo.keys[:1])
    return tensors


def test_a_pass_that_begins_anew_keeps_its_account():
    objective, source = token_problem()
    stopped = build_vamo(objective, stop_requested=iter([False, False, True]).__next__, token_budget=4)
    with pytest.raises(StopRequested):
        stopped.prepare(source, 0)
    vamo = build_vamo(objective, token_budget=5)
    vamo.load_state_dict(stopped.state_dict())
    work = vamo.prepare(source, 0)
    assert work.forward_samples == 2 * 4 + 4 * source.num_samples
    assert build_vamo(objective, token_budget=5).prepare(source, 0).forward_samples == 4 * source.num_samples


@pytest.mark.parametrize("seed", range(2))
def test_a_stale_snapshot_stops_correcting(seed: int):
    """Per-sample gradients that turn away from what the snapshot saw; exact variances over all samples at each step."""
    samples, dimension, period, steps = 64, 60, 128, 260
    first, second = (
        normal(samples, 4, seed=10 * seed + n) @ normal(4, dimension, seed=10 * seed + n + 2) for n in (0, 1)
    )
    objective = Quadratic(torch.zeros(dimension, dtype=torch.float64), curvature=torch.ones(dimension))
    source = ToySource(first.clone(), batch_size=1)
    directions = HashedDirections(TrainableParameters(objective.module))
    vamo = build_vamo(
        objective,
        directions=directions,
        num_probes=20,
        alpha=None,
        eps=1e-2,
        seed=seed,
        token_budget=64,
        snapshot_due=lambda step: step % period == 0,
    )
    ratios = {"adaptive": torch.zeros(steps), "one": torch.zeros(steps)}
    angle = 0.0
    for step in range(steps):
        angle += 0.03  # cos(angle since the snapshot): 1, then 0 after 52 steps, then negative
        source.features = math.cos(angle) * first + math.sin(angle) * second
        if vamo.prepare(source, step).forward_samples:
            z = torch.stack([directions.values(key, 0, dimension) for key in vamo.keys]).double()
            seen = -(source.features - source.features.mean(0))
            reported = seen @ z.T @ torch.linalg.inv(z @ z.T) @ z  # the corrections at coefficient 1
        drawn = int(torch.randint(samples, (1,), generator=torch.Generator().manual_seed(1000 * seed + step)))
        alpha = float(vamo.estimate([source.batch([drawn])], step).metrics["alpha"])
        noise = -(source.features - source.features.mean(0))
        for name, coefficient in (("adaptive", alpha), ("one", 1.0)):
            left = noise - coefficient * reported
            ratios[name][step] = float(left.square().sum() / noise.square().sum())
    age = torch.arange(steps) % period
    late = torch.arange(steps) >= 100
    assert ratios["one"][late].mean() > 1.1, "a fixed coefficient of 1 does harm here"
    assert ratios["adaptive"][late].mean() <= 1.02
    assert ratios["adaptive"][late & (age < 16)].mean() < 0.95
    assert ratios["adaptive"][late & (age >= 64)].mean() <= 1.05
