"""Snapshots under a mixture: the corrections have mean zero under the law by which samples are drawn."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.estimators.relatives import build_svrg, build_zo_svrg
from tests.toys import (
    NetworkObjective,
    TinyNetwork,
    ToySource,
    build_literal,
    build_vamo,
    exact_gradient,
    gradient,
    move,
    normal,
)
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.estimators.passes import reference_samples, systematic_counts

SAMPLES = 5
FREQUENCIES = torch.tensor([0.5, 0.5, 1.0, 1.25, 1.75], dtype=torch.float64)  # on average 1
LAW = FREQUENCIES / SAMPLES


def problem() -> tuple[NetworkObjective, ToySource]:
    source = ToySource(
        normal(SAMPLES, 6, seed=1),
        batch_size=2,
        counts=torch.tensor([3.0, 1.0, 2.0, 5.0, 1.0]),
        frequencies=FREQUENCIES.tolist(),
    )
    return NetworkObjective(TinyNetwork(6, dtype=torch.float64)), source


BUILD: dict[str, Callable[..., Any]] = {
    "svrg": build_svrg,
    "vamo": build_vamo,
    "vamo_recompute": lambda objective: build_vamo(objective, source="recompute"),
    "vamo_raw_sum": lambda objective: build_vamo(objective, orthogonalise=False),
    "vamo_literal": lambda objective: build_literal(objective, alpha=0.2),
}


@pytest.mark.parametrize("method", BUILD)
def test_the_correction_has_mean_zero_under_the_law_that_draws_the_samples(method: str) -> None:
    """The mean over all ordered batches of two, token counts being unequal."""
    objective, source = problem()
    estimator = BUILD[method](objective)
    estimator.prepare(source, 0)
    move(objective, 0.1)
    total, largest = torch.zeros(21, dtype=torch.float64), 0.0
    for indices in itertools.product(range(SAMPLES), repeat=2):
        batch = source.batch(indices)
        plain = exact_gradient(objective, batch)
        estimator.estimate([batch], 1)
        correction = gradient(objective) - plain
        total += LAW[list(indices)].prod() * correction
        largest = max(largest, float(correction.norm()))
    assert largest > 1e-2
    assert total.norm() < 1e-9 * largest


def test_the_full_gradient_of_zo_svrg_is_that_of_the_mixture() -> None:
    objective, source = problem()
    estimator = build_zo_svrg(objective, num_probes=2, eps=1e-5)
    estimator.prepare(source, 0)
    projected = estimator.estimate([source.batch([0, 1])], 0).projected
    assert projected is not None
    counts = source.counts.double()
    weighted: Tensor = sum(
        (LAW[i] * counts[i] * exact_gradient(objective, source.batch([i])) for i in range(SAMPLES)),
        start=torch.zeros(21, dtype=torch.float64),
    )
    full = weighted / (LAW * counts).sum()
    parameters = TrainableParameters(objective.module)
    sizes = [tensor.numel() for tensor in parameters.tensors]
    pieces = [piece.view_as(own) for piece, own in zip(full.split(sizes), parameters.tensors, strict=True)]
    expected = HashedDirections(parameters).dots(pieces, projected.keys) / 2
    assert torch.allclose(projected.coefficients.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_systematic_samples_hold_everyone_by_their_share_on_average(count: int) -> None:
    shares = LAW * count
    times = torch.stack(
        [systematic_counts(FREQUENCIES, count=count, shift=(each + 0.5) / 4000) for each in range(4000)]
    )
    assert (times.sum(1) == count).all()
    assert ((times - shares).abs() < 1).all()
    assert torch.allclose(times.double().mean(0), shares, atol=1e-12)


def test_a_subset_is_drawn_by_the_law_and_by_its_key_alone() -> None:
    _, source = problem()
    drawn = torch.zeros(SAMPLES, dtype=torch.float64)
    for step in range(2000):
        reference = reference_samples(source, subset=3, seed=7, step=step)
        assert reference.frequencies.sum() == 3
        assert reference.samples == sorted(set(reference.samples))
        drawn[reference.samples] += reference.of(reference.samples)
    assert torch.allclose(drawn / 6000, LAW, atol=0.015)  # five standard deviations of a Bernoulli mean of 6000
    again = reference_samples(source, subset=3, seed=7, step=1999)
    assert again.samples == reference.samples


def test_without_a_mixture_a_subset_is_one_without_replacement() -> None:
    source = ToySource(normal(9, 2, seed=0), batch_size=2)
    reference = reference_samples(source, subset=4, seed=1, step=3)
    assert len(reference.samples) == 4
    assert reference.frequencies.tolist() == [1.0] * 4
    assert reference_samples(source, subset=None, seed=1, step=3).samples == list(range(9))
