"""Pictures of plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Band", "ErrorPanel", "VariancePanel", "draw_diagnosis"]

_PANEL_INCHES = (6.0, 4.2)
_DOTS_PER_INCH = 120


@dataclass(frozen=True, slots=True)
class ErrorPanel:
    """Error of finite differences against the size of the perturbation.

    Attributes:
        label: what the size is.
        sizes: ascending.
        errors: relative ones by name of the curve, one for each size.
        usable: smallest and largest usable size.
        recommended: the size to take.
        configured: the size that the method takes.
    """

    label: str
    sizes: Sequence[float]
    errors: Mapping[str, Sequence[float]]
    usable: tuple[float, float]
    recommended: float
    configured: float


@dataclass(frozen=True, slots=True)
class Band:
    """A curve with its interval at every point."""

    values: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


@dataclass(frozen=True, slots=True)
class VariancePanel:
    """Variance ratios against the age of a snapshot.

    Attributes:
        ages: in steps, ascending.
        ratios: by name of the curve.
        same_compute: the ratio that a larger batch gives for the same compute.
    """

    ages: Sequence[int]
    ratios: Mapping[str, Band]
    same_compute: float


def draw_diagnosis(path: Path, *, errors: ErrorPanel, variance: VariancePanel | None) -> None:
    """Writes a PNG with one panel, or two side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 if variance is None else 2
    figure = Figure(figsize=(panels * _PANEL_INCHES[0], _PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)

    axes = figure.add_subplot(1, panels, 1)
    for name, values in errors.errors.items():
        axes.plot(errors.sizes, values, marker="o", label=f"{name} difference")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axvspan(*errors.usable, alpha=0.15, color="tab:green", label="usable")
    axes.axvline(errors.recommended, color="tab:green", label=f"recommended {errors.recommended:.1e}")
    axes.axvline(errors.configured, color="tab:red", linestyle="--", label=f"configured {errors.configured:.1e}")
    axes.set_xlabel(errors.label)
    axes.set_ylabel("relative error of the derivatives")
    axes.set_title("Rounding on the left, curvature on the right")
    axes.legend(fontsize="small")

    if variance is not None:
        axes = figure.add_subplot(1, panels, 2)
        for name, band in variance.ratios.items():
            (line,) = axes.plot(variance.ages, band.values, marker="o", label=name)
            axes.fill_between(variance.ages, band.lows, band.highs, alpha=0.15, color=line.get_color())
        axes.axhline(variance.same_compute, color="black", linestyle="--", label="a larger batch, same compute")
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(variance.ages, [str(age) for age in variance.ages])
        axes.set_xlabel("age of the snapshot (steps)")
        axes.set_ylabel("variance, corrected / plain")
        axes.set_title("What the correction leaves")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DOTS_PER_INCH)
