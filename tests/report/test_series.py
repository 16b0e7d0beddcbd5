import math
import random

import pytest

from vamo_ft.report.series import Clock, Series, smoothed, thinned


def test_smoothing_is_the_weighted_mean_of_what_came_before() -> None:
    values, span = [3.0, -1.0, 4.0, 1.5], 3.0
    keep = 1 - 2 / (span + 1)
    for count, found in enumerate(smoothed(values, span=span), start=1):
        weights = [keep ** (count - 1 - index) for index in range(count)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert found == pytest.approx(expected)
    assert smoothed(values, span=1.0) == values


def test_what_is_not_finite_does_not_spoil_the_smoothed_values() -> None:
    found = smoothed([1.0, math.nan, math.inf, 1.0], span=5.0)
    assert [math.isnan(value) for value in found] == [False, True, True, False]
    assert found[3] == pytest.approx(1.0)


def test_every_column_keeps_its_smallest_and_largest_value() -> None:
    generator = random.Random(1)
    x = sorted(generator.uniform(0, 10) for _ in range(5_000))
    y = [generator.gauss(0, 1) for _ in x]
    kept_x, kept_y = thinned(x, y, columns=20)
    assert len(kept_x) <= 2 * 21
    assert kept_x == sorted(kept_x)
    pairs = list(zip(x, y, strict=True))
    assert set(zip(kept_x, kept_y, strict=True)) <= set(pairs)
    width = (x[-1] - x[0]) / 20
    for column in range(20):
        inside = [value for place, value in pairs if int((place - x[0]) / width) == column]
        kept = [value for place, value in zip(kept_x, kept_y, strict=True) if int((place - x[0]) / width) == column]
        assert (min(inside), max(inside)) == (min(kept), max(kept))


def test_a_gap_is_kept_and_a_single_hole_is_not() -> None:
    y = [math.nan if index == 3 or 400 <= index < 600 else float(index) for index in range(1_000)]
    kept_x, kept_y = thinned(list(range(1_000)), y, columns=10)
    assert [x for x, value in zip(kept_x, kept_y, strict=True) if math.isnan(value)] == [400, 500]
    assert kept_y[0] == 0.0


@pytest.mark.parametrize("x", [[], [1.0], [2.0] * 50])
def test_few_points_and_points_at_one_place(x: list[float]) -> None:
    kept, _ = thinned(x, x, columns=4)
    assert kept == x[:1] if len(x) > 8 else kept == x


def test_the_clock_interpolates_between_what_is_known() -> None:
    clock = Clock()
    clock.append(10, evaluations=100, seconds=5)
    clock.append(20, evaluations=400, seconds=6)
    steps = [0, 5, 10, 15, 20, 30]
    assert clock.at(steps, clock.evaluations) == [0, 50, 100, 250, 400, 400]
    assert clock.at(steps, clock.seconds) == [0, 2.5, 5, 5.5, 6, 6]
    own = Series()
    own.append(10, 1.0)
    own.append(20, 1.0)
    assert clock.at(own.steps, clock.evaluations) == [100, 400]
