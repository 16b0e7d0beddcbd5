"""ZO-SVRG and MeZO-SVRG, against losses evaluated by hand."""

import copy

import pytest
import torch
from torch import Tensor

from tests.estimators.relatives import SAMPLES, build_zo_svrg, flat, token_problem
from tests.toys import ExplicitDirections, NetworkObjective, ToySource, exact_gradient, interrupted, move, normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import VamoFtError
from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Batch, Estimate, ProjectedGradient
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.estimators.zo_svrg import ZoSvrg
from vamo_ft.objectives.synthetic import Quadratic
from vamo_ft.optim.projected import ProjectedSgd

EPS = 1e-3


def stepped(estimator: ZoSvrg | Spsa, source, step: int, *, parts: int = 1) -> tuple[Estimate, ProjectedGradient]:
    estimator.prepare(source, step)
    rows = source.step_indices(step)
    size = len(rows) // parts
    estimate = estimator.estimate([source.batch(rows[i : i + size]) for i in range(0, len(rows), size)], step)
    assert estimate.projected is not None
    return estimate, estimate.projected


def derivative_by_hand(objective: NetworkObjective, batch: Batch, key: HashKey) -> Tensor:
    """() the mean loss's central difference along z, on a model of its own whose weights are set outright."""
    directions = HashedDirections(TrainableParameters(objective.module))
    z = directions.values(key, 0, directions.numel).double()
    losses = []
    for sign in (1, -1):
        other = NetworkObjective(copy.deepcopy(objective.network))
        other.module.eval()
        tensors = TrainableParameters(other.module).tensors
        torch.nn.utils.vector_to_parameters(flat(tensors).detach() + sign * EPS * z, tensors)
        with torch.no_grad():
            terms = other.terms(batch)
        losses.append(terms.total.sum() / terms.count.sum())
    return (losses[0] - losses[1]) / (2 * EPS)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_coefficients_equal_losses_by_hand_with_unequal_token_counts(parts):
    """A snapshot that followed the weights would give zeros, and other directions at the snapshot other numbers."""
    objective, source = token_problem()
    estimator = build_zo_svrg(objective, num_probes=3, token_budget=5)
    estimator.prepare(source, 1)
    snapshot = NetworkObjective(copy.deepcopy(objective.network))
    move(objective, 0.3)
    estimate, projected = stepped(estimator, source, 2, parts=parts)
    batch, data = source.batch(source.step_indices(2)), source.batch(range(SAMPLES))
    step_keys, full_keys = projected.keys[:3], projected.keys[3:]
    expected = [derivative_by_hand(objective, batch, k) - derivative_by_hand(snapshot, batch, k) for k in step_keys]
    expected += [derivative_by_hand(snapshot, data, key) for key in full_keys]
    assert torch.allclose(3 * projected.coefficients, torch.stack(expected), rtol=1e-9, atol=1e-11)
    assert projected.coefficients.abs().min() > 1e-4
    assert estimate.work.forward_samples == 2 * 6 * len(batch)


def test_no_two_directions_are_the_same():
    """Of all steps and snapshots, also where a step is the snapshot's own."""
    objective, source = token_problem()
    estimator = build_zo_svrg(objective, snapshot_due=lambda step: step % 2 == 0)
    projected = [stepped(estimator, source, step)[1] for step in range(6)]
    full_keys = [keys for p in projected[::2] for keys in p.keys]
    step_keys = [keys for p in projected[1::2] for keys in p.keys[:2]]
    assert len(set(full_keys + step_keys)) == 3 * 2 + 3 * 2
    for taken, used in zip(projected[::2], projected[1::2], strict=True):
        assert used.keys[2:] == taken.keys
        assert torch.equal(used.coefficients[2:], taken.coefficients)
    assert {key.step for key in full_keys} == {0, 2, 4}
    assert {key.step for key in step_keys} == {1, 3, 5}
    assert not {key.probe for key in full_keys} & {key.probe for key in step_keys}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_the_batch_terms_cancel_to_the_last_bit_at_the_snapshot(difference, dtype):
    objective, source = token_problem(dtype, dropout=0.3)
    estimator = build_zo_svrg(objective, difference=difference)
    estimator.prepare(source, 0)
    _, projected = stepped(estimator, source, 1)
    assert projected.coefficients[:2].tolist() == [0, 0]
    assert projected.coefficients[2:].all()
    move(objective, 0.3)
    _, projected = stepped(estimator, source, 1)
    assert projected.coefficients.all()


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_snapshots_own_step_is_a_full_step(scale):
    objective, source = token_problem()
    estimator = build_zo_svrg(objective, full_step_scale=scale, snapshot_due=lambda step: step == 3)
    for step in (0, 3):
        work = estimator.prepare(source, step)
        estimate, projected = stepped(estimator, source, step)
        assert work.forward_samples == 4 * SAMPLES
        data = source.batch(range(SAMPLES))
        expected = torch.stack([derivative_by_hand(objective, data, key) for key in projected.keys]) / 2
        assert torch.allclose(projected.coefficients, scale * expected, rtol=1e-9, atol=1e-11)
        assert estimate.work.forward_samples == source.batch_size
        with torch.no_grad():
            terms = objective.terms(source.batch(source.step_indices(step)))
        assert float(estimate.loss) == pytest.approx(float(terms.total.sum() / terms.count.sum()), rel=1e-12)
        move(objective, 0.2)
    _, later = stepped(estimator, source, 4)
    assert torch.allclose(scale * later.coefficients[2:], projected.coefficients, rtol=1e-12)


def test_orthonormal_bases_give_svrg():
    """With q = d directions of length sqrt(d), `(1/q) sum_j c_j z_j` is the gradient but for O(eps^2)."""
    objective, source = token_problem()
    parameters = TrainableParameters(objective.module)
    d = parameters.numel
    bases = [
        torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double())[0] for seed in (1, 2)
    ]
    rows = d**0.5 * torch.cat(bases)
    estimator = build_zo_svrg(objective, directions=ExplicitDirections(parameters, rows), num_probes=d, eps=1e-4)
    estimator.prepare(source, 0)
    batch = source.batch(source.step_indices(1))
    svrg = exact_gradient(objective, source.batch(range(SAMPLES))) - exact_gradient(objective, batch)
    move(objective, 0.3)
    svrg += exact_gradient(objective, batch)
    _, projected = stepped(estimator, source, 1)
    actual = projected.coefficients @ rows[[key.probe for key in projected.keys]]
    assert (actual - svrg).norm() <= 1e-5 * svrg.norm()


def test_the_update_is_the_dense_one():
    objective, source = token_problem()
    parameters = TrainableParameters(objective.module)
    directions = HashedDirections(parameters)
    estimator = build_zo_svrg(objective)
    estimator.prepare(source, 0)
    move(objective, 0.3)
    estimate, projected = stepped(estimator, source, 1)
    z = torch.stack([directions.values(key, 0, directions.numel) for key in projected.keys]).double()
    expected = flat(parameters.copy()) - 0.1 * projected.coefficients.float().double() @ z
    rule = ProjectedSgd(parameters, directions, weight_decay=0.0, max_grad_norm=None, seed=7)
    rule.apply(estimate, learning_rate=0.1, step=1)
    assert torch.allclose(flat(parameters.copy()), expected, rtol=1e-12, atol=1e-14)


def test_converges_where_plain_loss_differences_stall():
    """Strongly convex, constant learning rate: the batch's noise is gone at the optimum, and only then."""
    samples, dimension = 20, 6
    source = ToySource(normal(samples, dimension, seed=3), batch_size=2)
    curvature = torch.linspace(0.5, 2.0, dimension, dtype=torch.float64)
    optimum = source.features.mean(0)
    excess = []
    for corrected in (False, True):
        objective = Quadratic(torch.full((dimension,), 3.0, dtype=torch.float64), curvature=curvature)
        parameters = TrainableParameters(objective.module)
        directions = HashedDirections(parameters)
        if corrected:
            estimator = build_zo_svrg(objective, snapshot_due=lambda step: step % 6 == 0, token_budget=samples)
        else:
            probe = LossProbe(objective, parameters, directions, LocalRuntime())
            estimator = Spsa(probe, LocalRuntime(), num_probes=2, eps=EPS, difference="central", seed=7)
        rule = ProjectedSgd(parameters, directions, weight_decay=0.0, max_grad_norm=None, seed=7)
        for step in range(200):
            rule.apply(stepped(estimator, source, step)[0], learning_rate=0.05, step=step)
        excess.append(float(0.5 * ((objective.module.x.detach() - optimum).square() * curvature).sum()))
    assert excess[0] > 0.05
    assert excess[1] < 0.05 * excess[0]


def test_the_snapshot_is_a_copy_of_the_parameters():
    objective, source = token_problem()
    estimator = build_zo_svrg(objective)
    estimator.prepare(source, 0)
    here = flat(TrainableParameters(objective.module).copy())
    move(objective, 0.3)
    assert torch.equal(flat(tuple(estimator.state_dict()["snapshot"]["base"])), here)
    assert not torch.equal(flat(TrainableParameters(objective.module).copy()), here)


def test_an_interrupted_snapshot_goes_on_bit_for_bit():
    objective, source = token_problem(torch.float32)
    whole = build_zo_svrg(objective, token_budget=5)
    _, expected = stepped(whole, source, 0)
    estimator, work = interrupted(
        lambda stop: build_zo_svrg(objective, token_budget=5, stop_requested=stop), source, every=3
    )
    assert work.forward_samples == 4 * SAMPLES
    assert torch.equal(stepped(estimator, source, 0)[1].coefficients, expected.coefficients)
    move(objective, 0.3)
    restored = build_zo_svrg(objective)
    restored.load_state_dict(estimator.state_dict())
    _, later = stepped(whole, source, 1)
    assert torch.equal(stepped(restored, source, 1)[1].coefficients, later.coefficients)


def test_a_subset_stands_for_the_data():
    objective, source = token_problem()
    seen: list[int] = []
    batch = source.batch
    source.batch = lambda indices: (seen.extend(indices), batch(indices))[1]
    estimator = build_zo_svrg(objective, subset=7)
    assert estimator.prepare(source, 0).forward_samples == 4 * 7
    source.batch = batch
    _, projected = stepped(estimator, source, 0)
    expected = torch.stack([derivative_by_hand(objective, batch(seen), key) for key in projected.keys]) / 2
    assert torch.allclose(projected.coefficients, expected, rtol=1e-9, atol=1e-11)


def test_losses_that_ignore_the_perturbation_are_an_error_unless_they_are_piecewise_constant():
    objective, source = token_problem()
    with pytest.raises(VamoFtError, match="does not reach the model"):
        build_zo_svrg(objective, eps=1e-30).prepare(source, 0)
    _, projected = stepped(build_zo_svrg(objective, eps=1e-30, piecewise_constant=True), source, 0)
    assert projected.coefficients.tolist() == [0, 0]
