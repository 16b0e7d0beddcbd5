"""What the measurements come to, in a sentence."""

from dataclasses import dataclass
from typing import Literal

from vamo_ft.studies.intervals import Interval

__all__ = ["Verdict", "judge_correction", "judge_size"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a correction pays, with the sentence that says so."""

    outcome: Literal["pays", "does not pay", "undecided"]
    text: str


def judge_correction(configured: Interval, best: Interval | None, *, kappa: float, plain_method: str) -> Verdict:
    """Compares the variance ratio with `1 / kappa`, what the same compute buys as a larger batch.

    It pays where the whole interval lies below `1 / kappa`, does not where the whole interval lies above, and is
    undecided otherwise.

    Args:
        configured: Var(v) / Var(g), mean over a snapshot's life.
        best: the same with the optimal coefficient at every age; None where the configured one adapts already.
        kappa: compute with the correction over compute without.
        plain_method: the method to use where it does not pay.
    """
    removed = round(100 * (1 - configured.value), 1)
    effect = f"removes {abs(removed):.1f} % of" if removed >= 0 else f"adds {-removed:.1f} % to"
    text = (
        f"with these settings the correction {effect} the variance and costs {100 * (kappa - 1):.0f} % more "
        f"compute; a batch {kappa:.2f} times as large removes {100 * (1 - 1 / kappa):.0f} %"
    )
    if configured.high < 1 / kappa:
        return Verdict("pays", f"{text}: the correction pays")
    if configured.low < 1 / kappa:
        return Verdict("undecided", f"{text}: too close to tell, measure with more --batches")
    if best is not None and best.high < 1 / kappa:
        return Verdict(
            "does not pay",
            f"{text}; with the optimal coefficient it would remove {100 * (1 - best.value):.0f} %, and pay: use "
            "method.alpha: adaptive",
        )
    return Verdict("does not pay", f"{text}: use method.name: {plain_method}")


def judge_size(key: str, size: float, *, recommended: float, usable: tuple[float, float]) -> str:
    """A sentence on the size of the perturbation; `key` is where it is written."""
    span = f"{usable[0]:.1e} to {usable[1]:.1e}"
    if usable[0] <= size <= usable[1]:
        return f"{key}: {size:.1e} is in the usable range, {span}"
    return f"{key}: {size:.1e} is outside the usable range, {span}: use {recommended:.1e}"
