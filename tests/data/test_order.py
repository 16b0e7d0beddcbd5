import pytest
import torch

from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.data.order import SampleOrder


def drawn(order: SampleOrder, *, steps: int) -> list[int]:
    return [index for step in range(steps) for index in order.step_indices(step)]


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 1)])
def test_every_epoch_is_a_permutation_and_batches_run_across_epochs(num_samples: int, batch_size: int) -> None:
    order = SampleOrder(num_samples, batch_size=batch_size, seed=3)
    samples = drawn(order, steps=3 * num_samples)
    assert len(samples) == 3 * num_samples * batch_size
    for start in range(0, len(samples), num_samples):
        assert sorted(samples[start : start + num_samples]) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    first = drawn(SampleOrder(50, batch_size=50, seed=0), steps=3)
    assert first[:50] != first[50:100] != first[100:]
    assert first[:50] != list(range(50))
    assert first != drawn(SampleOrder(50, batch_size=50, seed=1), steps=3)
    assert first == drawn(SampleOrder(50, batch_size=50, seed=0), steps=3)


def test_the_order_of_samples_does_not_depend_on_the_batch_size() -> None:
    assert drawn(SampleOrder(10, batch_size=6, seed=5), steps=5) == drawn(
        SampleOrder(10, batch_size=1, seed=5), steps=30
    )


def test_a_seek_equals_the_sequence() -> None:
    sequential = SampleOrder(10, batch_size=4, seed=9)
    sequence = [sequential.step_indices(step) for step in range(40)]
    for step in (39, 0, 17, 16, 3):
        assert SampleOrder(10, batch_size=4, seed=9).step_indices(step) == sequence[step]
        assert sequential.step_indices(step) == sequence[step]
    assert len(SampleOrder(10, batch_size=4, seed=2**63 - 1).step_indices(10**12)) == 4


def test_a_permutation_sorts_by_the_hashed_bits_of_its_epoch() -> None:
    bits = random_bits(HashKey(6, Domain.ORDER, 2, 0), 0, 30, device=torch.device("cpu")).tolist()
    assert SampleOrder(30, batch_size=30, seed=6).step_indices(2) == tuple(sorted(range(30), key=bits.__getitem__))


def test_every_sample_comes_first_about_equally_often() -> None:
    order = SampleOrder(8, batch_size=8, seed=1)
    first = [order.step_indices(epoch)[0] for epoch in range(800)]
    # 800 draws of probability 1/8: mean 100, standard deviation 9.4
    assert all(60 < first.count(sample) < 140 for sample in range(8))
