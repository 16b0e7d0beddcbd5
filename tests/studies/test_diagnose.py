"""A whole diagnosis of toys whose answer is known."""

import pytest
import torch

from tests.studies.subjects import build_toy_subject, flat
from tests.toys import ExplicitDirections, NetworkObjective, TinyNetwork, ToySource, least_squares, normal
from vamo_ft.core.blocks import Block, BlockDirections
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import DivergenceError, UsageError
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.objectives.synthetic import Quadratic
from vamo_ft.studies.diagnose import diagnose
from vamo_ft.studies.held_out import SampleSubset

DIMENSION = 20


def quadratic(*, leading: float, samples: int = 400) -> tuple[Quadratic, ToySource]:
    """Noise of unit variance along every axis, and of variance `leading` along the first."""
    scales = torch.ones(DIMENSION, dtype=torch.float64)
    scales[0] = leading**0.5
    features = normal(samples, DIMENSION, seed=5) * scales
    objective = Quadratic(torch.ones(DIMENSION, dtype=torch.float64), curvature=torch.ones(DIMENSION))
    return objective, ToySource(features, batch_size=4)


def first_axis(owner) -> ExplicitDirections:
    return ExplicitDirections(owner, torch.eye(DIMENSION, dtype=torch.float64)[:1])


def test_a_direction_that_holds_the_noise_pays() -> None:
    """On a quadratic per-sample noise never changes: the correction removes the same share at every age."""
    objective, source = quadratic(leading=200.0)
    subject = build_toy_subject(objective, source, directions=first_axis, num_probes=1, period=400)
    found = diagnose(subject, samples=60, steps=3, batches=30)
    share = 200 / (200 + DIMENSION - 1)
    assert found.shares["configured"] == pytest.approx(share, rel=0.05)
    assert found.variance is not None and found.verdict is not None
    assert [row.age for row in found.variance.rows] == [0, 1, 2, 4, 8, 16, 32, 64]
    for row in found.variance.rows:
        assert row.configured.value == pytest.approx(1 - share, rel=0.5)
        assert row.best_alpha.value == pytest.approx(1, abs=0.05)
        assert row.configured.low <= row.configured.value <= row.configured.high
    # 400 steps are 4 epochs: 2 passes for each sample and snapshot beside 3 units in each of 4 epochs
    assert found.cost.kappa == pytest.approx(1 + 2 / (3 * 4))
    assert found.cost.plain.forward_samples == found.cost.plain.backward_samples == source.num_samples
    assert found.cost.method.forward_samples == pytest.approx(source.num_samples * (1 + 2 / 4))
    assert found.verdict.outcome == "pays"
    assert found.seen == 0
    assert found.reach["structure"].stable_rank == 1


def test_directions_that_hold_nothing_do_not_pay() -> None:
    objective, source = quadratic(leading=0.0)
    subject = build_toy_subject(objective, source, directions=first_axis, num_probes=1, period=100)
    found = diagnose(subject, samples=20, steps=0, batches=20)
    assert found.verdict is not None and found.variance is not None
    assert found.verdict.outcome == "does not pay"
    assert found.variance.configured.value == pytest.approx(1, abs=1e-6)
    assert found.verdict.text == (
        "with these settings the correction removes 0.0 % of the variance and costs 67 % more compute; "
        "a batch 1.67 times as large removes 40 %: use method.name: sgd"
    )
    assert found.uninformed == "1 of them take more than 1 training steps"


def test_the_ratio_is_that_of_dense_gradients_after_training() -> None:
    """Ages, batches and coefficients by hand, with the derivatives of autograd in the table's place."""
    objective, source = least_squares(num_samples=200, dimension=6, batch_size=5)
    rows = normal(2, 6, seed=8)
    subject = build_toy_subject(
        objective, source, directions=lambda owner: ExplicitDirections(owner, rows), eps=1e-5, period=2, alpha=0.7
    )
    found = diagnose(subject, samples=10, steps=2, batches=6)
    assert found.variance is not None

    objective, source = least_squares(num_samples=200, dimension=6, batch_size=5)
    x = objective.module.x

    def gradients(indices) -> torch.Tensor:
        terms = [objective.terms(source.batch([index])).total.sum() for index in indices]
        return torch.stack([torch.autograd.grad(term, x)[0] for term in terms])

    def step(number: int) -> None:
        move = gradients(source.step_indices(number)).mean(0)
        with torch.no_grad():
            x.sub_(0.05 * move)

    step(0)
    step(1)
    batches = [source.step_indices(4 + number) for number in range(6)]  # past the warm-up and the oldest age
    table = torch.stack([gradients(batch).mean(0) for batch in batches]) @ rows.T
    corrections = 0.7 * table @ torch.linalg.inv(rows @ rows.T) @ rows
    for row, moves in zip(found.variance.rows, [(), (2,), (3,)], strict=True):
        for number in moves:
            step(number)
        plain = torch.stack([gradients(batch).mean(0) for batch in batches])
        corrected = plain - corrections
        ratio = (corrected - corrected.mean(0)).square().sum() / (plain - plain.mean(0)).square().sum()
        assert row.configured.value == pytest.approx(float(ratio), rel=1e-5)
    assert torch.allclose(flat(subject.parameters.tensors), x.detach(), atol=1e-12)


def test_zeroth_order_methods_have_no_correction_to_judge() -> None:
    objective, source = quadratic(leading=50.0)
    found = diagnose(build_toy_subject(objective, source, method="spsa"), samples=20, steps=6, batches=3)
    assert found.variance is None and found.verdict is None
    assert found.cost.kappa == pytest.approx(4 / 3)
    assert found.num_batches == 0
    assert {"configured", "isotropic", "informed"} == found.shares.keys()
    assert found.shares["informed"] > 2 * found.shares["isotropic"]
    assert (found.reach["structure"].stable_rank, found.reach["structure"].overlap) == (DIMENSION, pytest.approx(1))


def test_blocks_are_told_apart() -> None:
    objective = NetworkObjective(TinyNetwork(10))
    source = ToySource(normal(60, 10, seed=1, dtype=torch.float32), batch_size=4)
    blocks = [Block("weights", (1,)), Block("bias", (0,))]
    subject = build_toy_subject(
        objective,
        source,
        method="spsa",
        eps=1e-2,
        directions=lambda owner: BlockDirections(HashedDirections(owner), blocks, order="cyclic"),
    )
    reach = diagnose(subject, samples=8, steps=0, batches=3).reach
    assert list(reach) == ["structure", "weights", "bias"]
    assert reach["weights"].stable_rank == 30
    assert reach["weights"].overlap + reach["bias"].overlap == pytest.approx(1)


def test_informed_directions_are_fed_by_the_warm_up_and_find_the_noise() -> None:
    objective, source = quadratic(leading=300.0)
    subject = build_toy_subject(
        objective, source, directions=lambda owner: GradientSubspace(owner, size=2, warmup=10), eps=1e-2
    )
    with pytest.raises(UsageError, match=r"--steps 9: method\.directions\.warmup_steps asks for 10"):
        diagnose(subject, samples=20, steps=9, batches=3)
    found = diagnose(subject, samples=20, steps=10, batches=3)
    assert found.shares["configured"] == found.shares["informed"] > 0.9
    assert found.shares["isotropic"] < 0.5


def test_samples_that_training_has_seen_are_counted() -> None:
    objective, source = quadratic(leading=1.0, samples=20)
    found = diagnose(build_toy_subject(objective, source, period=2), samples=30, steps=3, batches=4)
    assert found.num_samples == 20  # all there are
    assert found.seen == 20


def test_a_loss_that_is_not_finite_stops_the_study() -> None:
    objective, source = quadratic(leading=1.0)
    subject = build_toy_subject(objective, source, learning_rate=1e200)
    with pytest.raises(DivergenceError, match=r"step 2: the loss is .*; nothing was measured"):
        diagnose(subject, samples=4, steps=9, batches=3)


def test_a_subset_of_the_samples_is_a_source() -> None:
    _, source = quadratic(leading=1.0, samples=10)
    subset = SampleSubset(source, [7, 2, 9])
    batch = subset.batch([2, 0])
    assert batch.indices == (2, 0)
    assert torch.equal(batch.inputs["features"], source.features[[9, 7]])
    assert subset.numbers([9, 7]) == [2, 0]
    assert subset.groups([0, 1, 2], token_budget=2) == [(0, 1), (2,)]
    assert subset.step_indices(0) == (0, 1, 2, 0)
    assert subset.num_samples == 3
    assert subset.fingerprint != SampleSubset(source, [7, 2, 8]).fingerprint
