"""SVRG and alpha-SVRG, against their formulas by autograd."""

import pytest
import torch
from torch import Tensor

from tests.estimators.relatives import SAMPLES, build_svrg, flat, token_problem
from tests.toys import ToySource, exact_gradient, gradient, interrupted, move, normal
from vamo_ft.core.errors import StopRequested
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.svrg import Svrg
from vamo_ft.objectives.synthetic import Quadratic


def corrected(svrg: Svrg, objective, source: ToySource, step: int) -> Tensor:
    svrg.prepare(source, step)
    svrg.estimate([source.batch(source.step_indices(step))], step)
    return gradient(objective)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("normaliser", ["data", "batch"])
def test_equals_the_formula_with_unequal_token_counts(normaliser, alpha):
    objective, source = token_problem()
    svrg = build_svrg(objective, normaliser=normaliser, alpha_at=lambda step: alpha, token_budget=5)
    step, rows, t = 2, list(source.step_indices(2)), source.counts.double()
    summed = torch.stack([t[i] * exact_gradient(objective, source.batch([i])) for i in range(SAMPLES)])
    full = summed.sum(0) / t.sum()
    svrg.prepare(source, step - 1)
    move(objective, 0.2)
    divisor = t[rows].sum() if normaliser == "batch" else len(rows) * t.mean()
    noise = (summed[rows] - t[rows, None] * full).sum(0) / divisor
    plain = exact_gradient(objective, source.batch(rows))
    actual = corrected(svrg, objective, source, step)
    assert torch.allclose(actual, plain - alpha * noise, rtol=1e-12, atol=1e-14)
    assert (actual - plain).norm() > 1e-2 * plain.norm()
    if normaliser == "batch":
        move(objective, -0.2)
        textbook = plain - alpha * (exact_gradient(objective, source.batch(rows)) - full)
        assert torch.allclose(actual, textbook, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normaliser", ["data", "batch"])
def test_the_correction_vanishes_on_the_full_batch(normaliser):
    objective, source = token_problem()
    source.batch_size = source.num_samples
    svrg = build_svrg(objective, normaliser=normaliser)
    svrg.prepare(source, 0)
    move(objective, 0.2)
    exact = exact_gradient(objective, source.batch(range(SAMPLES)))
    assert (corrected(svrg, objective, source, 1) - exact).norm() <= 1e-12 * exact.norm()


def test_the_corrections_of_an_epoch_sum_to_zero():
    """So that the mean over an epoch's batches is that of plain gradients, wherever the snapshot lies."""
    objective, source = token_problem()
    svrg = build_svrg(objective)
    corrections = []
    for step in range(source.num_samples // source.batch_size):
        svrg.prepare(source, step)
        move(objective, 0.1)
        plain = exact_gradient(objective, source.batch(source.step_indices(step)))
        corrections.append(plain - corrected(svrg, objective, source, step))
    total, largest = torch.stack(corrections).sum(0).norm(), torch.stack(corrections).norm(dim=1).max()
    assert largest > 1e-2
    assert total <= 1e-12 * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alpha_zero_is_first_order_bit_for_bit_at_its_cost(dtype):
    objective, source = token_problem(dtype, dropout=0.3)
    svrg = build_svrg(objective, alpha_at=lambda step: 0.0)
    plain = FirstOrder(objective, TrainableParameters(objective.module), LocalRuntime(), seed=7)
    for step in range(3):
        actual = corrected(svrg, objective, source, step)
        batches = [source.batch(source.step_indices(step))]
        expected = plain.estimate(batches, step)
        assert torch.equal(actual, gradient(objective))
        assert svrg.estimate(batches, step).work == expected.work


def test_alpha_is_that_of_the_step():
    objective, source = token_problem()
    svrg = build_svrg(objective, alpha_at=lambda step: 1 - step / 4)
    whole = build_svrg(objective)
    for step in range(4):
        plain = exact_gradient(objective, source.batch(source.step_indices(step)))
        part, full = (plain - corrected(each, objective, source, step) for each in (svrg, whole))
        assert torch.allclose(part, (1 - step / 4) * full, rtol=1e-9, atol=1e-13)
        assert svrg.estimate([source.batch([0])], step).metrics["alpha"] == 1 - step / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_interrupted_snapshot_goes_on_bit_for_bit(dtype):
    objective, source = token_problem(dtype)
    whole = build_svrg(objective, token_budget=5)
    whole.prepare(source, 0)
    svrg, work = interrupted(lambda stop: build_svrg(objective, token_budget=5, stop_requested=stop), source, every=3)
    assert (work.forward_samples, work.backward_samples) == (SAMPLES, SAMPLES)
    move(objective, 0.2)
    expected = corrected(whole, objective, source, 1).clone()
    assert torch.equal(corrected(svrg, objective, source, 1), expected)


def test_an_open_snapshot_begins_anew_when_its_batches_are_cut_differently():
    objective, source = token_problem()
    expected = corrected(build_svrg(objective), objective, source, 0).clone()
    stopped = build_svrg(objective, stop_requested=iter([False, True]).__next__)
    with pytest.raises(StopRequested):
        stopped.prepare(source, 0)
    svrg = build_svrg(objective, token_budget=5)
    svrg.load_state_dict(stopped.state_dict())
    assert torch.allclose(corrected(svrg, objective, source, 0), expected, rtol=1e-12, atol=1e-14)


def test_the_full_gradient_is_summed_in_float32_with_dropout_off():
    """bfloat16 sums would lose what a group adds to many; masks would make the gradient another one."""
    objective, source = token_problem(torch.bfloat16, dropout=0.5)
    svrg = build_svrg(objective, token_budget=1)
    svrg.prepare(source, 0)
    objective.module.eval()
    tensors = TrainableParameters(objective.module).tensors
    expected = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
    for index in range(SAMPLES):
        grads = torch.autograd.grad(objective.terms(source.batch([index])).total.sum(), tensors)
        expected = [total + grad.float() for total, grad in zip(expected, grads, strict=True)]
    assert svrg._snapshot is not None
    assert all(torch.equal(*pair) for pair in zip(svrg._snapshot.sums, expected, strict=True))


def test_a_new_snapshot_is_taken_when_due_and_stays_where_it_was_taken():
    objective, source = token_problem()
    svrg = build_svrg(objective, snapshot_due=lambda step: step % 3 == 0)
    taken = []
    for step in range(7):
        if svrg.prepare(source, step).forward_samples > 0:
            taken.append(step)
            here = flat(TrainableParameters(objective.module).copy())
        base = svrg.state_dict()["snapshot"]["base"]
        assert torch.equal(flat(tuple(base)), here)
        move(objective, 0.1)
    assert taken == [0, 3, 6]


def test_a_subset_stands_for_the_data():
    objective, source = token_problem()
    seen: list[int] = []
    batch = source.batch
    source.batch = lambda indices: (seen.extend(indices), batch(indices))[1]
    svrg = build_svrg(objective, subset=7)
    assert svrg.prepare(source, 0).backward_samples == 7
    source.batch = batch
    assert len(set(seen)) == 7
    rows, t = list(source.step_indices(0)), source.counts.double()
    full = exact_gradient(objective, batch(seen))
    plain = exact_gradient(objective, batch(rows))
    noise = t[rows].sum() * (plain - full) / (len(rows) * t[seen].mean())
    assert torch.allclose(corrected(svrg, objective, source, 0), plain - noise, rtol=1e-10, atol=1e-13)


def test_a_step_costs_two_forward_and_two_backward_passes():
    objective, source = token_problem()
    svrg = build_svrg(objective)
    svrg.prepare(source, 0)
    passes = {"forward": 0, "backward": 0}
    layer = objective.network.layer
    layer.register_forward_hook(lambda *_: passes.update(forward=passes["forward"] + 1))
    layer.weight.register_hook(lambda _: passes.update(backward=passes["backward"] + 1))
    work = svrg.estimate([source.batch(range(3)), source.batch(range(3, 6))], 0).work
    assert passes == {"forward": 4, "backward": 4}
    assert (work.forward_samples, work.backward_samples) == (12, 12)
    assert (work.forward_tokens, work.backward_tokens) == (12, 12)


def test_converges_where_sgd_stalls():
    """Strongly convex, constant learning rate: SGD ends in a ball of noise, SVRG goes on (linear rate in theory)."""
    samples, dimension = 20, 6
    source = ToySource(normal(samples, dimension, seed=3), batch_size=2)
    curvature = torch.linspace(0.5, 2.0, dimension, dtype=torch.float64)
    optimum = source.features.mean(0)
    excess = []
    for alpha in (0.0, 1.0):
        objective = Quadratic(torch.ones(dimension, dtype=torch.float64) * 3, curvature=curvature)
        svrg = build_svrg(objective, alpha_at=lambda step, alpha=alpha: alpha, snapshot_due=lambda step: step % 10 == 0)
        point = objective.module.x
        for step in range(200):
            move_by = corrected(svrg, objective, source, step)
            with torch.no_grad():
                point -= 0.2 * move_by
        excess.append(float(0.5 * ((point.detach() - optimum).square() * curvature).sum()))
    assert excess[0] > 1e-3
    assert excess[1] < 1e-12
