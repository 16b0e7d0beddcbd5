"""Timing of several things in turn, so that a slow moment of the machine meets all of them."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Contender", "Timings", "measure", "synchronise"]

Timings = dict[str, list[float]]
"""Contender -> seconds of one turn, one figure for each round."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: key of its timings.
        run: one turn. If it returns seconds it has timed itself, else the whole call is timed.
        turns: calls in one round, spread evenly over it; the round's figure is their mean.
    """

    name: str
    run: Callable[[], float | None]
    turns: int = 1


def measure(contenders: Sequence[Contender], *, repeats: int, warmup: int, device: torch.device) -> Timings:
    """Runs `warmup` rounds without a record (they compile and allocate), then `repeats` rounds with one.

    Within a round the contenders alternate: A B C A B C.
    """
    timings: Timings = {contender.name: [] for contender in contenders}
    for number in range(warmup + repeats):
        gc.collect()
        seconds = dict.fromkeys(timings, 0.0)
        for contender in _schedule(contenders):
            seconds[contender.name] += _timed(contender.run, device)
        if number >= warmup:
            for contender in contenders:
                timings[contender.name].append(seconds[contender.name] / contender.turns)
    return timings


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _schedule(contenders: Sequence[Contender]) -> list[Contender]:
    """All turns of a round, each contender's spread evenly over it."""
    places = [
        ((turn + 0.5) / contender.turns, order)
        for order, contender in enumerate(contenders)
        for turn in range(contender.turns)
    ]
    return [contenders[order] for _, order in sorted(places)]


def _timed(run: Callable[[], float | None], device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    own = run()
    synchronise(device)
    return time.perf_counter() - began if own is None else own
