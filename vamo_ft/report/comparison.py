"""A comparison of methods as a picture and as a table in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vamo_ft.report.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bar", "Cost", "draw_comparison", "markdown_table"]

_PANEL_INCHES = (5.2, 4.2)
_DOTS_PER_INCH = 120


@dataclass(frozen=True, slots=True)
class Bar:
    """A final value with its interval, which is None where runs diverged."""

    label: str
    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step takes; seconds are None where none was made."""

    label: str
    step_seconds: float | None
    memory_gigabytes: float


def draw_comparison(
    path: Path,
    *,
    curves: Mapping[str, Sequence[Curve]],
    spent: str,
    metric: str,
    bars: Sequence[Bar],
    costs: Sequence[Cost],
) -> None:
    """Writes a PNG: each quantity against what was spent, final values with intervals, memory against time.

    The same arguments give the same picture. No global state of matplotlib is read or written.

    Args:
        curves: quantity -> a curve of each method, in the order of `bars`.
        spent: label of the horizontal axis.
        metric: what the bars are values of.
        costs: in the order of `bars`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {bar.label: f"C{number % 10}" for number, bar in enumerate(bars)}
    rows, columns = (2, 2) if len(curves) == 2 else (1, len(curves) + 2)
    figure = Figure(figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (quantity, of_methods) in zip(axes, curves.items(), strict=False):
        _draw_curves(axis, of_methods, colours)
        axis.set_xlabel(spent)
        axis.set_title(f"held-out {quantity} against what was spent")
    _draw_bars(axes[-2], bars, colours)
    axes[-2].set_title(f"final {metric}, median and 95 % interval of the mean")
    _draw_costs(axes[-1], costs, colours)
    axes[-1].set_title("memory against time")
    for axis in axes:
        axis.grid(visible=True, alpha=0.25)
        axis.ticklabel_format(axis="y", useOffset=False)
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": ""})


def _draw_curves(axis: "Axes", curves: Sequence[Curve], colours: Mapping[str, str]) -> None:
    for curve in curves:
        colour = colours[curve.label]
        axis.plot(curve.x, curve.middle, color=colour, marker=".", linewidth=1.4, label=curve.label)
        axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    if curves:
        axis.legend(fontsize="small")


def _draw_bars(axis: "Axes", bars: Sequence[Bar], colours: Mapping[str, str]) -> None:
    for place, bar in enumerate(bars):
        if bar.interval is not None:
            axis.plot([place, place], bar.interval, color=colours[bar.label], linewidth=2, alpha=0.6)
        if bar.value is not None:
            axis.plot([place], [bar.value], color=colours[bar.label], marker="o")
    names = [bar.label if bar.value is not None else f"{bar.label}\n(diverged)" for bar in bars]
    axis.set_xticks(range(len(bars)), names, rotation=20, fontsize="small")
    axis.set_xlim(-0.5, len(bars) - 0.5)


def _draw_costs(axis: "Axes", costs: Sequence[Cost], colours: Mapping[str, str]) -> None:
    for cost in costs:
        if cost.step_seconds is not None:
            place = (cost.step_seconds, cost.memory_gigabytes)
            axis.plot(*([each] for each in place), color=colours[cost.label], marker="o", linestyle="")
            axis.annotate(cost.label, place, textcoords="offset points", xytext=(5, 4), fontsize="small")
    axis.set_xlabel("seconds per step, snapshots included")
    axis.set_ylabel("peak memory (GB)")
    axis.margins(0.2)
    axis.set_ylim(bottom=0)  # so that small differences look small


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
