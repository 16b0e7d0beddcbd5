"""Figures over a run, and how many points become few enough to draw."""

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Clock", "Series", "smoothed", "thinned"]


def _doubles() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class Series:
    """One figure at the steps at which it was written, which ascend; NaN where it was not finite."""

    steps: "array[float]" = field(default_factory=_doubles)
    values: "array[float]" = field(default_factory=_doubles)

    def append(self, step: float, value: float) -> None:
        """Adds a value after the others."""
        self.steps.append(step)
        self.values.append(value)

    @property
    def finite(self) -> list[tuple[float, float]]:
        """(step, value) of the values that are numbers."""
        return [pair for pair in zip(self.steps, self.values, strict=True) if math.isfinite(pair[1])]


@dataclass(slots=True)
class Clock:
    """What a run had spent at its steps, 0 before the first of them.

    Attributes:
        steps: ascending.
        evaluations: sample evaluations, forward + 2 x backward.
        seconds: of training.
    """

    steps: "array[float]" = field(default_factory=lambda: array("d", [0.0]))
    evaluations: "array[float]" = field(default_factory=lambda: array("d", [0.0]))
    seconds: "array[float]" = field(default_factory=lambda: array("d", [0.0]))

    def append(self, step: float, *, evaluations: float, seconds: float) -> None:
        """Adds a reading after the others."""
        self.steps.append(step)
        self.evaluations.append(evaluations)
        self.seconds.append(seconds)

    def at(self, steps: Sequence[float], readings: Sequence[float]) -> list[float]:
        """The reading at each of `steps`: linear between two that are known, the last one after them.

        Args:
            readings: `evaluations` or `seconds`.
        """
        if steps == self.steps[1:]:  # what a line of metrics says of its own step
            return list(readings[1:])
        known, last, found = self.steps, len(self.steps) - 1, []
        for step in steps:
            after = bisect_right(known, step)
            if after > last:
                found.append(readings[last])
                continue
            before = max(0, after - 1)
            share = (step - known[before]) / (known[after] - known[before])
            found.append(readings[before] + share * (readings[after] - readings[before]))
        return found


def smoothed(values: Sequence[float], *, span: float) -> list[float]:
    """Exponential moving average over about `span` values, without the pull of its start.

    m_t = b m_{t-1} + (1 - b) v_t,  shown as m_t / (1 - b^t),  b = 1 - 2 / (span + 1)

    (the correction of Kingma and Ba, arXiv 1412.6980, section 3). Values that are not finite stay so and do not count.

    Args:
        span: at least 1, which changes nothing.
    """
    keep = 1 - 2 / (span + 1)
    mean, weight, result = 0.0, 1.0, []
    for value in values:
        if not math.isfinite(value):
            result.append(math.nan)
            continue
        mean, weight = keep * mean + (1 - keep) * value, weight * keep
        result.append(mean / (1 - weight))
    return result


def thinned(x: Sequence[float], y: Sequence[float], *, columns: int) -> tuple[list[float], list[float]]:
    """At most two points in each of `columns` equal parts of the horizontal axis: its smallest and its largest value.

    A line through them covers the pixels that a line through all of them would. A part without a finite value keeps one
    that is not, as a gap. What is short enough comes back as it is.

    Args:
        x: ascending.
        y: as many.
        columns: about the width of the picture in pixels.
    """
    if len(x) <= 2 * columns:
        return list(x), list(y)
    width = (x[-1] - x[0]) / columns or 1.0
    kept: list[int] = []
    start = 0
    while start < len(x):
        column = int((x[start] - x[0]) / width)
        low = high = start
        end = start + 1
        while end < len(x) and int((x[end] - x[0]) / width) == column:
            if not y[low] <= y[end]:  # also where the one so far is NaN
                low = end if not math.isnan(y[end]) else low
            if not y[high] >= y[end]:
                high = end if not math.isnan(y[end]) else high
            end += 1
        kept += sorted({low, high})
        start = end
    return [x[index] for index in kept], [y[index] for index in kept]
