"""Pictures of training curves with bands over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

__all__ = ["Curve", "Panel", "draw_panels"]

_STYLES = ("-", "--", ":", "-.")
_COLOURS = 10  # of matplotlib's cycle; the line style tells later curves apart


@dataclass(frozen=True, slots=True)
class Curve:
    """One line, and what lies between the smallest and the largest value at each point."""

    label: str
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """The same curves against one quantity.

    Attributes:
        x_label: the quantity, with its unit.
        curves: in the order of the legend.
        logarithmic: whether the quantity is, for curves that differ in it by an order of magnitude; begins at the
            first point above 0.
    """

    x_label: str
    curves: Sequence[Curve]
    logarithmic: bool = False


def draw_panels(panels: Sequence[Panel], path: Path, *, title: str, y_label: str, ceiling: float | None = None) -> None:
    """Writes the panels side by side as a PNG, on a logarithmic vertical axis, with one legend below.

    The same arguments give the same picture. No global state of matplotlib is read or written.

    Args:
        panels: with the same labels in the same order.
        path: of the file; its folder is made.
        ceiling: top of the vertical axis, for curves that leave it; None shows everything.
    """
    figure = Figure(figsize=(4.2 * len(panels), 4.4), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, curve in enumerate(panel.curves):
            colour = f"C{number % _COLOURS}"
            style = _STYLES[number // _COLOURS % len(_STYLES)]
            first = sum(x <= 0 for x in curve.x) if panel.logarithmic else 0
            x, middle, low, high = (each[first:] for each in (curve.x, curve.middle, curve.low, curve.high))
            axis.plot(x, middle, color=colour, linestyle=style, linewidth=1.4, label=curve.label)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel(panel.x_label)
        if panel.logarithmic:
            axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(visible=True, which="both", alpha=0.25)
    axes[0].set_ylabel(y_label)
    axes[0].set_ylim(top=ceiling)
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": ""})
