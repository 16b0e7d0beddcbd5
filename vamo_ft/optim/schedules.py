"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from typing import Literal

__all__ = ["ScheduleName", "learning_rate_at"]

ScheduleName = Literal["constant", "linear", "cosine"]


def learning_rate_at(step: int, *, schedule: ScheduleName, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of update number `step`, counted from 0; the same values as transformers' schedules.

    Args:
        schedule: course after the warm-up: constant, or linear or half a cosine down to 0 at `total_steps`.
        peak: learning rate at the end of the warm-up.
        warmup_steps: updates of linear increase from 0.
        total_steps: updates of the whole run.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * ((1 - done) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
