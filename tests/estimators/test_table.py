"""The batch term of the correction, against its definition."""

import itertools

import pytest
import torch

from tests.toys import normal
from vamo_ft.estimators.probes import ProbePoint
from vamo_ft.estimators.table import DerivativeTable

SAMPLES, PROBES = 6, 2
COUNTS = torch.tensor([1.0, 4.0, 2.0, 9.0, 3.0, 5.0])
DERIVATIVES = normal(SAMPLES, PROBES, seed=1) * COUNTS.unsqueeze(1)


def table(reference: list[int]) -> DerivativeTable:
    made = DerivativeTable(SAMPLES, num_probes=PROBES, dtype=torch.float64, device=torch.device("cpu"))
    for probe in range(PROBES):
        made.add(range(SAMPLES), ProbePoint(probe, 1.0, 1.0), DERIVATIVES[:, probe], COUNTS)
    made.close(reference)
    return made


@pytest.mark.parametrize("times", [[1] * 6, [3, 1, 2, 1, 5, 1]])
def test_the_noise_has_mean_zero_under_the_law_that_draws_the_samples(times: list[int]) -> None:
    """Uniform sampling, and a mixture of data sets of which some samples are drawn several times as often.

    The mean over all ordered batches of three, each drawn from the mixture, token counts being unequal.
    """
    reference = [sample for sample, number in enumerate(times) for _ in range(number)]
    made = table(reference)
    law = torch.tensor(times, dtype=torch.float64) / sum(times)
    total = torch.zeros(PROBES, dtype=torch.float64)
    largest = 0.0
    for batch in itertools.product(range(SAMPLES), repeat=3):
        noise = made.batch_noise(batch, normaliser="data")
        total += law[list(batch)].prod() * noise
        largest = max(largest, float(noise.abs().max()))
    assert largest > 0.1
    assert total.abs().max() < 1e-12


def test_the_noise_is_that_of_the_mean_gradient() -> None:
    """b = [sum_I (dL - t cbar)] / (b Tbar), written out."""
    made = table(list(range(SAMPLES)))
    mean = DERIVATIVES.sum(0) / COUNTS.sum()
    batch = [4, 1, 1]
    expected = sum(DERIVATIVES[i] - COUNTS[i] * mean for i in batch) / (3 * COUNTS.mean())
    assert torch.allclose(made.batch_noise(batch, normaliser="data"), expected, atol=1e-12)
    by_tokens = DERIVATIVES[batch].sum(0) / COUNTS[batch].sum() - mean
    assert torch.allclose(made.batch_noise(batch, normaliser="batch"), by_tokens, atol=1e-12)
    assert torch.allclose(made.mean, mean, atol=1e-12)
