"""VAMO to the letter, against a transcription of the paper's formulas."""

import pytest
import torch
from torch import Tensor

from tests.toys import (
    NetworkObjective,
    TinyNetwork,
    ToySource,
    build_literal,
    exact_gradient,
    gradient,
    interrupted,
    move,
    normal,
)
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError, VamoFtError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Objective
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.vamo_literal import VamoLiteral
from vamo_ft.objectives.synthetic import Quadratic

SAMPLES, BATCH, RADIUS = 12, 4, 1e-3


def problem(*, equal: bool = True, dtype: torch.dtype = torch.float64) -> tuple[NetworkObjective, ToySource]:
    counts = torch.full((SAMPLES,), 2.0) if equal else torch.arange(SAMPLES) % 5 + 1.0
    source = ToySource(normal(SAMPLES, 6, seed=1, dtype=dtype), batch_size=BATCH, counts=counts)
    return NetworkObjective(TinyNetwork(6, dtype=dtype)), source


def corrected(vamo: VamoLiteral, objective: Objective, source: ToySource, step: int) -> Tensor:
    vamo.prepare(source, step)
    vamo.estimate([source.batch(source.step_indices(step))], step)
    return gradient(objective).clone()


def unit_vectors(objective: Objective, *, num_probes: int, step: int) -> Tensor:
    """(n, q, d) the u_ij, from the normal numbers of their keys alone."""
    parameters = TrainableParameters(objective.module)
    hashed = HashedDirections(parameters, distribution="gaussian")
    keys = [HashKey(7, Domain.DIRECTION, step, number) for number in range(SAMPLES * num_probes)]
    normals = torch.stack([hashed.values(key, 0, hashed.numel).double() for key in keys])
    return (normals / normals.norm(dim=1, keepdim=True)).view(SAMPLES, num_probes, -1)


def value(objective: Objective, source: ToySource, sample: int, at: Tensor) -> Tensor:
    """() f_i at a point given as a vector: the sample's loss, in units of the mean weight."""
    parameters = TrainableParameters(objective.module)
    saved = parameters.copy()
    shapes = [tensor.shape for tensor in saved]
    pieces = at.split([shape.numel() for shape in shapes])
    parameters.assign([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
    with torch.no_grad():
        total = objective.terms(source.batch([sample])).total.sum() / source.counts.double().mean()
    parameters.assign(saved)
    return total


def sample_estimates(objective: Objective, source: ToySource, *, num_probes: int, step: int) -> Tensor:
    """(n, d) the paper's ghat_i at the present point, by its formula."""
    u = unit_vectors(objective, num_probes=num_probes, step=step)
    snapshot = torch.cat([tensor.detach().reshape(-1) for tensor in TrainableParameters(objective.module).tensors])
    d = len(snapshot)
    estimates = torch.zeros(SAMPLES, d, dtype=torch.float64)
    for i in range(SAMPLES):
        f = value(objective, source, i, snapshot)
        for j in range(num_probes):
            difference = value(objective, source, i, snapshot + RADIUS * u[i, j]) - f
            estimates[i] += d / RADIUS * difference * u[i, j] / num_probes
    return estimates


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.4])
def test_it_is_the_papers_formula(num_probes, equal, alpha):
    objective, source = problem(equal=equal)
    vamo = build_literal(objective, num_probes=num_probes, radius=RADIUS, alpha=alpha)
    ghat = sample_estimates(objective, source, num_probes=num_probes, step=1)
    weights = source.counts.double() / source.counts.double().mean()  # t_i / Tbar, all 1 in the paper
    coefficient = num_probes / ghat.shape[1] if alpha is None else alpha
    vamo.prepare(source, 1)
    move(objective, 0.1)
    for step in (1, 2):
        batch = list(source.step_indices(step))
        correction = ghat[batch].mean(0) - weights[batch].mean() * ghat.mean(0)
        expected = exact_gradient(objective, source.batch(batch)) - coefficient * correction
        actual = corrected(vamo, objective, source, step)
        assert (actual - expected).norm() < 1e-5 * (coefficient * correction).norm()


@pytest.mark.parametrize("equal", [True, False])
def test_the_corrections_of_an_epoch_sum_to_zero(equal):
    objective, source = problem(equal=equal)
    vamo = build_literal(objective, num_probes=2, alpha=1.0)
    corrections = []
    for step in range(SAMPLES // BATCH):
        plain = exact_gradient(objective, source.batch(source.step_indices(step)))
        corrections.append(plain - corrected(vamo, objective, source, step))
        move(objective, 0.05)
    total, largest = torch.stack(corrections).sum(0).norm(), torch.stack(corrections).norm(dim=1).max()
    assert largest > 1e-2
    assert total < 1e-6 * largest


def test_alpha_zero_is_first_order():
    objective, source = problem(dtype=torch.float32)
    actual = corrected(build_literal(objective, alpha=0.0), objective, source, 0)
    plain = FirstOrder(objective, TrainableParameters(objective.module), LocalRuntime(), seed=7)
    plain.estimate([source.batch(source.step_indices(0))], 0)
    assert torch.equal(actual, gradient(objective))


@pytest.mark.parametrize(("offset", "reduces"), [(0.0, True), (1.5, False)])
def test_variance_with_a_fresh_snapshot(offset, reduces):
    """Batches of one, q = 1, alpha = 1/d, in the mean over directions, on a quadratic.

    With sigma^2 the mean of |grad f_i - grad f|^2 and r = |grad f|^2 / sigma^2: since E|ghat_i|^2 = d |grad f_i|^2,

        Var(v) / sigma^2 = 1 - (1 - r) / d - r / d^2 - (d - 1) (1 + r) / (n d^2)

    of which the law `1 - (1 - r) / d` is what remains for large d and n: the rest is the noise that ghat shares with
    ghat_i. Far from the minimum (r > 1) the correction adds variance. The tolerance is three standard errors.
    """
    d, n, snapshots = 10, 8, 60
    features = normal(n, d, seed=3)
    features -= features.mean(0)
    objective = Quadratic(torch.full((d,), offset, dtype=torch.float64), curvature=torch.ones(d))
    source = ToySource(features, batch_size=1)
    mean = exact_gradient(objective, source.batch(range(n)))
    before = sum((exact_gradient(objective, source.batch([i])) - mean).square().sum() for i in range(n))
    r = float(mean.square().sum() / (before / n))
    after = torch.zeros((), dtype=torch.float64)
    for seed in range(snapshots):
        vamo = build_literal(objective, num_probes=1, radius=1e-5, seed=seed)
        for step in range(n):
            after += (corrected(vamo, objective, source, step) - mean).square().sum() / snapshots
    expected = 1 - (1 - r) / d - r / d**2 - (d - 1) * (1 + r) / (n * d**2)
    assert (expected < 0.9) if reduces else (expected > 1.1)
    assert float(after / before) == pytest.approx(expected, abs=0.02 if reduces else 0.04)


def test_an_interrupted_snapshot_goes_on_where_it_stopped():
    objective, source = problem(equal=False)
    expected = corrected(build_literal(objective), objective, source, 0)
    vamo, work = interrupted(lambda stop: build_literal(objective, stop_requested=stop), source, every=5)
    assert work.forward_samples == 4 * SAMPLES
    assert torch.equal(corrected(vamo, objective, source, 0), expected)


def test_a_new_snapshot_is_taken_when_due_and_only_then():
    objective, source = problem()
    vamo = build_literal(objective, snapshot_due=lambda step: step % 3 == 0)
    due = []
    for step in range(7):
        due.append(vamo.prepare(source, step).forward_samples > 0)
        vamo.estimate([source.batch(source.step_indices(step))], step)
        move(objective, 0.05)
    assert due == [True, False, False, True, False, False, True]


def test_what_cannot_be_done_is_refused():
    class Endless(ToySource):
        num_samples = 1 << 31

    objective, source = problem()
    endless = Endless(source.features, batch_size=BATCH)
    with pytest.raises(UsageError, match=r"^method\.probes: 2 directions for each of 2147483648 samples are more"):
        build_literal(objective, num_probes=2).prepare(endless, 0)
    with pytest.raises(VamoFtError, match=r"method\.radius too small for the precision"):
        build_literal(objective, radius=1e-30).prepare(source, 0)
