"""The order of a mixture, against a transcription that keeps the state of every data set."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from vamo_ft.core.hashing import Domain, HashKey, permutation
from vamo_ft.data.examples import TokenWriter, concatenated
from vamo_ft.data.mixture import MixedOrder, Mixture
from vamo_ft.data.order import SampleOrder

MIXTURES = [
    Mixture((5, 8), (2.0, 1.0)),
    Mixture((7, 3, 4), (1.0, 1.0, 0.1)),
    Mixture((6, 6), (0.3, 0.3)),
    Mixture((1, 9), (1.0, 4.0)),
    Mixture((3,), (0.5,)),
]


def drawn(order: MixedOrder, *, epochs: int, batch_size: int) -> list[int]:
    count = epochs * order.samples_per_epoch
    samples = [index for step in range(-(-count // batch_size)) for index in order.step_indices(step)]
    return samples[:count]


def walked(mixture: Mixture, *, seed: int, epochs: int) -> list[int]:
    """Epoch after epoch: which data set comes next is permuted, and each goes on in its own permutations."""
    starts = [sum(mixture.sizes[:number]) for number in range(len(mixture.sizes))]
    owners = [number for number, draws in enumerate(mixture.draws) for _ in range(draws)]
    waiting: list[list[int]] = [[] for _ in mixture.sizes]
    passes = [0] * len(mixture.sizes)
    samples = []
    for epoch in range(epochs):
        for slot in permutation(len(owners), HashKey(seed, Domain.ORDER, epoch, 0)).tolist():
            number = owners[slot]
            if not waiting[number]:
                waiting[number] = permutation(
                    mixture.sizes[number], HashKey(seed, Domain.ORDER, passes[number], number + 1)
                ).tolist()
                passes[number] += 1
            samples.append(starts[number] + waiting[number].pop(0))
    return samples


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_the_order_is_the_one_that_a_walk_takes(mixture: Mixture, batch_size: int) -> None:
    order = MixedOrder(mixture, batch_size=batch_size, seed=6)
    assert drawn(order, epochs=4, batch_size=batch_size) == walked(mixture, seed=6, epochs=4)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_epoch_has_every_sample_and_the_shares_of_the_weights(mixture: Mixture) -> None:
    assert mixture.weights is not None
    order = MixedOrder(mixture, batch_size=1, seed=0)
    epoch = drawn(order, epochs=1, batch_size=1)
    assert set(epoch) == set(range(sum(mixture.sizes)))
    scale = max(Fraction(size) / Fraction(weight) for size, weight in zip(mixture.sizes, mixture.weights, strict=True))
    for draws, weight in zip(mixture.draws, mixture.weights, strict=True):
        assert abs(draws - scale * Fraction(weight)) <= Fraction(1, 2)
    assert any(draws == size for draws, size in zip(mixture.draws, mixture.sizes, strict=True))


def test_weights_have_no_unit() -> None:
    assert Mixture((5, 8), (2, 1)).draws == Mixture((5, 8), (1, 0.5)).draws == (16, 8)
    assert Mixture((5, 8), None).draws == (5, 8)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_in_the_long_run_every_sample_is_drawn_as_often_as_its_frequency_says(mixture: Mixture) -> None:
    """After a number of epochs in which every data set ends a pass, to the last draw."""
    epochs = 1
    for size in mixture.sizes:
        epochs *= size
    order, total = MixedOrder(mixture, batch_size=50, seed=2), sum(mixture.sizes)
    times = Counter(drawn(order, epochs=epochs, batch_size=50))
    for index in range(total):
        assert times[index] / (epochs * order.samples_per_epoch) == pytest.approx(order.frequency(index) / total)
    assert sum(map(order.frequency, range(total))) == pytest.approx(total, rel=1e-14)


def test_a_seek_equals_the_sequence() -> None:
    sequential = MixedOrder(MIXTURES[1], batch_size=4, seed=9)
    sequence = [sequential.step_indices(step) for step in range(40)]
    for step in (39, 0, 17, 16, 3):
        assert MixedOrder(MIXTURES[1], batch_size=4, seed=9).step_indices(step) == sequence[step]
        assert sequential.step_indices(step) == sequence[step]
    assert len(sequential.step_indices(10**9)) == 4


def test_data_sets_lie_mixed_and_seeds_differ() -> None:
    order = MixedOrder(Mixture((40, 40), (1.0, 1.0)), batch_size=80, seed=1)
    first = order.step_indices(0)
    assert {index < 40 for index in first[:20]} == {True, False}
    assert [index for index in first if index < 40] != [index - 40 for index in first if index >= 40]
    assert first != MixedOrder(Mixture((40, 40), (1.0, 1.0)), batch_size=80, seed=2).step_indices(0)


def test_samples_of_several_data_sets_are_numbered_through() -> None:
    parts = []
    for seed in range(3):
        writer = TokenWriter()
        writer.skip()
        for index in range(seed + 1):
            row = [seed, index, 7, 8]
            if index == 0:
                writer.append(row, ((1, 2), (3, 4)), label=seed, options=((seed,), (9,)), references=(f"r{seed}",))
            else:
                writer.append(row, ((2, 4),), documents=(2, 4), rows=(2 * index, 3 + seed), truncated=True)
        parts.append(writer.finish())
    whole = concatenated(parts)
    pairs = [(part, index) for part in parts for index in range(len(part))]
    assert [whole[number] for number in range(6)] == [
        replace(part[index], index=number) for number, (part, index) in enumerate(pairs)
    ]
    assert [whole.rows_of(number) for number in range(6)] == [part.rows_of(index) for part, index in pairs]
    assert (len(whole), whole.num_truncated, whole.num_skipped) == (6, 3, 3)
    assert [Mixture((1, 2, 3)).owner(number) for number in range(6)] == [0, 1, 1, 2, 2, 2]
    assert concatenated(parts[:1]) is parts[0]


def test_a_single_data_set_and_a_list_without_weights_keep_their_order() -> None:
    order = SampleOrder(10, batch_size=4, seed=9)
    assert order.samples_per_epoch == 10
    assert {order.frequency(index) for index in range(10)} == {1.0}
