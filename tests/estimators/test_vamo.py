"""The facts of VAMO's mathematics, each against an independent computation."""

import logging

import pytest
import torch
from torch import Tensor

from tests.toys import (
    ExplicitDirections,
    NetworkObjective,
    TinyNetwork,
    ToySource,
    build_vamo,
    exact_gradient,
    gradient,
    interrupted,
    least_squares,
    move,
    normal,
)
from vamo_ft.core.errors import StopRequested, VamoFtError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Batch
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.vamo import Vamo
from vamo_ft.objectives.synthetic import Quadratic


def corrected(vamo: Vamo, source: ToySource, step: int) -> Tensor:
    vamo.prepare(source, step)
    vamo.estimate([source.batch(source.step_indices(step))], step)
    return gradient_of(vamo)


def gradient_of(vamo: Vamo) -> Tensor:
    return torch.cat([tensor.grad.reshape(-1) for tensor in vamo._parameters.tensors if tensor.grad is not None])


def token_problem() -> tuple[NetworkObjective, ToySource]:
    counts = torch.arange(24) % 5 + 1.0
    source = ToySource(normal(24, 10, seed=1), batch_size=6, counts=counts)
    return NetworkObjective(TinyNetwork(10, dtype=torch.float64)), source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alpha_zero_is_first_order_bit_for_bit(dtype):
    objective = NetworkObjective(TinyNetwork(10, dtype=dtype))
    source = ToySource(normal(24, 10, seed=1, dtype=dtype), batch_size=6)
    vamo = build_vamo(objective, alpha=0.0)
    plain = FirstOrder(objective, TrainableParameters(objective.module), LocalRuntime(), seed=7)
    for step in range(3):
        actual = corrected(vamo, source, step)
        plain.estimate([source.batch(source.step_indices(step))], step)
        assert torch.equal(actual, gradient(objective))


@pytest.mark.parametrize("normaliser", ["data", "batch"])
def test_the_correction_vanishes_on_the_full_batch(normaliser):
    objective, source = token_problem()
    source.batch_size = source.num_samples
    exact = exact_gradient(objective, source.batch(range(24)))
    actual = corrected(build_vamo(objective, normaliser=normaliser), source, 0)
    assert (actual - exact).norm() <= 1e-6 * exact.norm()


def test_the_corrections_of_an_epoch_sum_to_zero():
    objective, source = token_problem()
    vamo = build_vamo(objective, num_probes=4)
    corrections = []
    for step in range(source.num_samples // source.batch_size):
        move(objective, 0.05)  # the point moves on; table and snapshot stay
        plain = exact_gradient(objective, source.batch(source.step_indices(step)))
        corrections.append(plain - corrected(vamo, source, step))
    total, largest = torch.stack(corrections).sum(0).norm(), torch.stack(corrections).norm(dim=1).max()
    assert largest > 1e-3
    assert total <= 1e-6 * largest


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("source_name", ["table", "recompute"])
def test_a_full_orthonormal_basis_gives_svrg(difference, source_name):
    dimension = 12
    objective, source = least_squares(num_samples=30, dimension=dimension, batch_size=5)
    parameters = TrainableParameters(objective.module)
    basis, _ = torch.linalg.qr(normal(dimension, dimension, seed=4))
    vamo = build_vamo(
        objective,
        directions=ExplicitDirections(parameters, basis),
        num_probes=dimension,
        difference=difference,
        source=source_name,
        eps=1e-5 if difference == "central" else 1e-7,
    )
    snapshot_full = exact_gradient(objective, source.batch(range(30)))
    snapshot_batch = exact_gradient(objective, source.batch(source.step_indices(1)))
    vamo.prepare(source, 0)
    move(objective, 0.2)
    svrg = exact_gradient(objective, source.batch(source.step_indices(1))) - snapshot_batch + snapshot_full
    actual = corrected(vamo, source, 1)
    assert (actual - svrg).norm() <= 1e-6 * svrg.norm()


@pytest.mark.parametrize("kind", ["projected", "orthonormal", "raw"])
@pytest.mark.parametrize("probes", [10, 50, 200])
def test_variance_after_the_correction_is_what_the_theory_says(kind, probes):
    """On a quadratic, where finite differences are exact, so that only the projection matters."""
    dimension, samples, snapshots = 200, 32 if probes < 200 else 8, max(2, 80 // probes)
    features = normal(samples, dimension, seed=3)
    objective = Quadratic(torch.zeros(dimension, dtype=torch.float64), curvature=torch.ones(dimension))
    source = ToySource(features, batch_size=1)
    parameters = TrainableParameters(objective.module)
    mean = exact_gradient(objective, source.batch(range(samples)))
    before = sum((exact_gradient(objective, source.batch([i])) - mean).square().sum() for i in range(samples))
    after = torch.zeros((), dtype=torch.float64)
    for snapshot in range(snapshots):
        directions = None
        if kind == "orthonormal":
            rows, _ = torch.linalg.qr(normal(dimension, probes, seed=100 + snapshot))
            directions = ExplicitDirections(parameters, rows.T)
        vamo = build_vamo(
            objective,
            directions=directions,
            num_probes=probes,
            orthogonalise=kind != "raw",
            seed=snapshot,
            token_budget=samples,
        )
        vamo.prepare(source, 0)
        for step in range(samples):
            after += (corrected(vamo, source, step) - mean).square().sum() / snapshots
    share = probes / dimension
    expected = 1 - share + (probes * (probes - 1) / dimension**2 if kind == "raw" else 0)
    assert float(after / before) == pytest.approx(expected, abs=0.06 if kind == "raw" and probes == 200 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normaliser", ["data", "batch"])
def test_table_and_recompute_give_the_same_direction(dtype, normaliser):
    counts = torch.arange(24) % 5 + 1.0
    source = ToySource(normal(24, 10, seed=1, dtype=dtype), batch_size=6, counts=counts)
    objectives = [NetworkObjective(TinyNetwork(10, dtype=dtype)) for _ in range(2)]
    eps = 1e-2 if dtype == torch.float32 else 1e-4
    estimators = [
        build_vamo(objective, source=name, num_probes=4, eps=eps, normaliser=normaliser)
        for objective, name in zip(objectives, ("table", "recompute"), strict=True)
    ]
    for step in range(4):
        table, recompute = (corrected(vamo, source, step) for vamo in estimators)
        plain = exact_gradient(objectives[0], source.batch(source.step_indices(step)))
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        assert (table - recompute).norm() <= tolerance * plain.norm()
        assert (table - plain).norm() > 1e-2 * plain.norm()
        for objective in objectives:
            move(objective, 0.05)


def test_the_batch_term_equals_the_formula_with_unequal_token_counts():
    """b and cbar from autograd derivatives of every sample, the correction from dense linear algebra."""
    objective, source = token_problem()
    vamo = build_vamo(objective, num_probes=3)
    step = 2
    vamo.prepare(source, step)
    assert vamo._snapshot is not None
    keys = vamo._snapshots.keys(vamo._snapshot)
    z = torch.stack([vamo._directions.values(key, 0, vamo._directions.numel) for key in keys]).double()
    counts = source.counts.double()
    derivatives = torch.stack([exact_gradient(objective, source.batch([i])) * counts[i] for i in range(24)]) @ z.T
    mean = derivatives.sum(0) / counts.sum()
    rows = list(source.step_indices(step))
    b = (derivatives[rows] - counts[rows].unsqueeze(1) * mean).sum(0) / (len(rows) * counts.mean())
    expected = exact_gradient(objective, source.batch(rows)) - torch.linalg.solve(z @ z.T, b) @ z
    assert torch.allclose(corrected(vamo, source, step), expected, atol=1e-7)


def test_an_interrupted_snapshot_goes_on_where_it_stopped():
    whole = build_vamo(token_problem()[0])
    objective, source = token_problem()
    expected = corrected(whole, source, 0)
    vamo, work = interrupted(lambda stop: build_vamo(objective, stop_requested=stop), source, every=3)
    assert work.forward_samples == 4 * source.num_samples
    assert torch.equal(corrected(vamo, source, 0), expected)


def test_a_new_snapshot_is_taken_when_due_and_only_then():
    objective, source = token_problem()
    vamo = build_vamo(objective, snapshot_due=lambda step: step % 3 == 0)
    taken = [step for step in range(8) if vamo.prepare(source, step).forward_samples > 0]
    assert taken == [0, 3, 6]


def test_a_subset_snapshot_scores_its_reference_and_the_steps_ahead():
    objective, source = token_problem()
    seen: set[int] = set()
    batch = source.batch

    def record(indices) -> Batch:
        seen.update(indices)
        return batch(indices)

    source.batch = record
    vamo = build_vamo(objective, subset=5, horizon=2)
    vamo.prepare(source, 1)
    ahead = set(source.step_indices(1)) | set(source.step_indices(2))
    assert ahead <= seen
    reference = vamo._snapshots.samples(source, vamo._snapshot)[1].samples
    assert len(reference) == 5
    assert seen == ahead | set(reference)
    counts = source.counts[reference].double()
    rows = [exact_gradient(objective, batch([i])) * source.counts[i] for i in reference]
    z = torch.stack(
        [vamo._directions.values(k, 0, vamo._directions.numel) for k in vamo._snapshots.keys(vamo._snapshot)]
    )
    expected = (torch.stack(rows) @ z.double().T).sum(0) / counts.sum()
    assert torch.allclose(vamo._snapshot.table.mean, expected, atol=1e-7)
    with pytest.raises(AssertionError, match="not in the snapshot's table"):
        corrected(vamo, source, 3)


def test_auto_eps_avoids_rounding_noise_and_curvature(caplog):
    """In float32 with losses near 1e4 a small eps is noise; the choice correlates with autograd."""

    class Offset(NetworkObjective):
        def terms(self, batch):
            terms = super().terms(batch)
            return type(terms)(terms.total + 1e4, terms.count)

    objective = Offset(TinyNetwork(10))
    source = ToySource(normal(24, 10, seed=1, dtype=torch.float32), batch_size=6)
    vamo = build_vamo(objective, eps=None, num_probes=4)
    with caplog.at_level(logging.INFO, logger="vamo_ft"):
        vamo.prepare(source, 0)
    assert vamo._snapshots.eps in (1e-2, 3e-2)
    assert vamo._snapshots.eps_correlation is not None and vamo._snapshots.eps_correlation > 0.7
    assert "eps: auto chose" in caplog.text
    plain = build_vamo(NetworkObjective(TinyNetwork(10, dtype=torch.float64)), eps=None, num_probes=4)
    plain.prepare(ToySource(normal(24, 10, seed=1), batch_size=6), 0)
    assert plain._snapshots.eps_correlation == pytest.approx(1, abs=1e-6)
    assert plain._snapshots.eps == 1e-4


def test_more_probes_than_parameters_are_refused():
    objective, _ = least_squares(num_samples=4, dimension=3, batch_size=2)
    with pytest.raises(ValueError, match="4 probes exceed the 3 trainable parameters"):
        build_vamo(objective, num_probes=4)


def test_losses_that_ignore_the_perturbation_are_an_error():
    objective, source = token_problem()
    with pytest.raises(VamoFtError, match="does not reach the model"):
        build_vamo(objective, eps=1e-30).prepare(source, 0)


def test_an_open_snapshot_begins_anew_when_its_batches_are_cut_differently():
    objective, source = token_problem()
    expected = corrected(build_vamo(objective), source, 0)
    stopped = build_vamo(objective, stop_requested=iter([False, True]).__next__)
    with pytest.raises(StopRequested):
        stopped.prepare(source, 0)
    vamo = build_vamo(objective, token_budget=5)
    vamo.load_state_dict(stopped.state_dict())
    assert torch.allclose(corrected(vamo, source, 0), expected, atol=1e-12)


def test_one_sample_leaves_eps_at_its_usual_value():
    objective = NetworkObjective(TinyNetwork(10, dtype=torch.float64))
    vamo = build_vamo(objective, eps=None, num_probes=1)
    vamo.prepare(ToySource(normal(1, 10, seed=1), batch_size=1), 0)
    assert vamo._snapshots.eps == 1e-3


def test_the_correction_is_proportional_to_alpha():
    objective, source = token_problem()
    plain, half, whole = (corrected(build_vamo(objective, alpha=alpha), source, 1) for alpha in (0.0, 0.5, 1.0))
    assert (plain - whole).norm() > 1e-3 * plain.norm()
    assert torch.allclose(plain - half, 0.5 * (plain - whole), atol=1e-12)
