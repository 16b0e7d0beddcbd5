"""What the cases report: rows, a table and JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["CaseResult", "NotAvailable", "Row", "Target", "at_least", "at_most", "compare", "table"]


class NotAvailable(Exception):
    """A case, or a part of one, cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Target:
    """What a ratio should be: `reach` is wanted, `aim` is hoped for."""

    reach: float
    aim: float
    better: Literal["higher", "lower"]

    def verdict(self, ratio: float) -> str:
        """`aim`, `reached` or `missed`."""
        sign = 1 if self.better == "higher" else -1
        if sign * ratio >= sign * self.aim:
            return "aim"
        return "reached" if sign * ratio >= sign * self.reach else "missed"


def at_least(reach: float, aim: float) -> Target:
    """A target of which more is better."""
    return Target(reach, aim, "higher")


def at_most(reach: float, aim: float) -> Target:
    """A target of which less is better."""
    return Target(reach, aim, "lower")


@dataclass(frozen=True)
class Row:
    """The ratio of two things, `a / b`.

    Attributes:
        name: what is compared under which circumstances.
        a: name of the numerator.
        b: name of the denominator.
        ratio: median over the rounds of the ratio within a round.
        quartiles: lower and upper quartile of the same.
        a_median: median of the numerator alone, in `unit`.
        b_median: median of the denominator alone.
        unit: s (seconds per step, pass or sweep) or MiB.
        repeats: rounds.
        target: what the ratio should be.
        rates: GB/s of the two, by the keys a and b, where memory traffic is known.
        shown_as: ratio, or extra (the ratio less 1, in percent).
    """

    name: str
    a: str
    b: str
    ratio: float
    quartiles: tuple[float, float]
    a_median: float
    b_median: float
    unit: Literal["s", "MiB"]
    repeats: int
    target: Target | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    shown_as: Literal["ratio", "extra"] = "ratio"

    def to_json(self) -> dict[str, Any]:
        """Plain values; the extra in percent and the verdict beside the ratio."""
        target = self.target
        return {
            "name": self.name,
            "a": self.a,
            "b": self.b,
            "ratio": self.ratio,
            "quartiles": list(self.quartiles),
            "extra_percent": 100 * (self.ratio - 1),
            "a_median": self.a_median,
            "b_median": self.b_median,
            "unit": self.unit,
            "repeats": self.repeats,
            "target": None
            if target is None
            else {
                "reach": target.reach,
                "aim": target.aim,
                "better": target.better,
                "verdict": target.verdict(self.ratio),
            },
            "gb_per_s": dict(self.rates),
        }


@dataclass
class CaseResult:
    """The rows of a case, and notes on what could not be measured."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"rows": [row.to_json() for row in self.rows], "notes": list(self.notes)}


def compare(
    name: str,
    figures: Mapping[str, Sequence[float]],
    a: str,
    b: str,
    *,
    target: Target | None = None,
    unit: Literal["s", "MiB"] = "s",
    rates: Mapping[str, float] | None = None,
    shown_as: Literal["ratio", "extra"] = "ratio",
) -> Row:
    """The row of `a / b`, from figures of the same rounds.

    The ratio is formed within each round, where both met the same machine; its median and quartiles are over rounds.
    """
    ratios = [above / below for above, below in zip(figures[a], figures[b], strict=True)]
    lower, middle, upper = quartiles(ratios)
    return Row(
        name=name,
        a=a,
        b=b,
        ratio=middle,
        quartiles=(lower, upper),
        a_median=statistics.median(figures[a]),
        b_median=statistics.median(figures[b]),
        unit=unit,
        repeats=len(ratios),
        target=target,
        rates=rates or {},
        shown_as=shown_as,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, middle, upper


def table(results: Mapping[str, CaseResult]) -> str:
    """All cases as text, one line for each row."""
    lines: list[tuple[str, ...]] = [("case", "comparison", "ratio", "quartiles", "a", "b", "reach / aim", "")]
    for case, result in results.items():
        lines += [(case, *_cells(row)) for row in result.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(len(line) for line in text))
    notes = [f"{case}: {note}" for case, result in results.items() for note in result.notes]
    return "\n".join([*text, *notes])


def _cells(row: Row) -> tuple[str, ...]:
    def shown(ratio: float) -> str:
        return f"{100 * (ratio - 1):+.1f} %" if row.shown_as == "extra" else f"{ratio:.3g}"

    target = row.target
    sign = "" if target is None else {"higher": ">=", "lower": "<="}[target.better]
    return (
        f"{row.name}: {row.a} / {row.b}",
        shown(row.ratio),
        f"{shown(row.quartiles[0])} .. {shown(row.quartiles[1])}",
        f"{row.a_median:.4g} {row.unit}{_rate(row, 'a')}",
        f"{row.b_median:.4g} {row.unit}{_rate(row, 'b')}",
        "" if target is None else f"{sign} {shown(target.reach)} / {shown(target.aim)}",
        "" if target is None else target.verdict(row.ratio),
    )


def _rate(row: Row, side: str) -> str:
    return f" ({row.rates[side]:.3g} GB/s)" if side in row.rates else ""
