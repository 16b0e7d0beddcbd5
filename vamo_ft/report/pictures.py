"""Which pictures show a set of runs, as plain numbers: what is drawn is in `drawing`."""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vamo_ft.report.collect import RunRecord
from vamo_ft.report.series import Series, smoothed, thinned

__all__ = ["Event", "Line", "Panel", "Picture", "pictures_of"]

COLUMNS = 600
"""Of points in a panel; more than it has pixels."""

_SPANS = 40  # a smoothed curve shows about so many independent values
_DESCRIBED = 8  # runs in a picture's description
_RAW = 3  # with more runs the values behind the smoothed curves would only hide each other
_FIRST = ("method.alpha", "method.correlation")
_LONGEST = 40
_GAPS = 50
_SCORE = "eval."
_NOISY = ("grad_norm", "tokens_per_second", "method.")
_UNITS = {"peak_memory_bytes": "peak memory (GB)", "tokens_per_second": "tokens per second"}

Axis = Literal["step", "evaluations", "seconds"]
_AXES: tuple[tuple[Axis, str], ...] = (
    ("step", "step"),
    ("evaluations", "sample evaluations (forward + 2 backward)"),
    ("seconds", "seconds"),
)
Runs = Sequence[tuple[str, RunRecord]]
"""With their labels."""
Described = Sequence[tuple[str, Series]]
"""What a picture's description tells of."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points to be joined.

    Attributes:
        label: in the legend; None: not in it.
        colour: number of the colour.
        kind: `raw` values lie faintly behind a `curve`; `points` are few and marked.
        x, y: as many; NaN in y is a gap.
        gaps: x of values that were not finite.
    """

    label: str | None
    colour: int
    kind: Literal["curve", "raw", "points"]
    x: Sequence[float]
    y: Sequence[float]
    gaps: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """A resume or a rollback at a place on the horizontal axis."""

    kind: Literal["resume", "rollback"]
    x: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    Attributes:
        from_zero: whether the vertical axis begins there, so that small changes look small.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line]
    events: Sequence[Event] = ()
    logarithmic: bool = False
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels side by side.

    Attributes:
        name: for a file.
        title: for people.
        description: what it shows, in words, for those who do not see it.
        panels: at least one.
    """

    name: str
    title: str
    description: str
    panels: Sequence[Panel] = field(default_factory=list)


def pictures_of(runs: Sequence[RunRecord], *, labels: Sequence[str]) -> list[Picture]:
    """All pictures for which there is something to show.

    Args:
        labels: of the runs, all different.
    """
    named = list(zip(labels, runs, strict=True))
    pictures = [_losses(named)]
    metrics = _names(run.evaluation for run in runs)
    pictures += [
        _picture(f"eval_{name}", f"Evaluation: {name}", [_panel(named, _SCORE + name)])
        for name in metrics
        if name != "loss"
    ]
    pictures += [
        _picture("learning_rate", "Learning rate and gradient norm", _panels(named, ["learning_rate", "grad_norm"])),
        _picture("method", "The method's own figures", _panels(named, _method_names(runs))),
        _picture("resources", "Throughput and memory", _panels(named, ["tokens_per_second", "peak_memory_bytes"])),
    ]
    return [picture for picture in pictures if picture.panels]


def _losses(runs: Runs) -> Picture:
    """The losses of training and of evaluation in the same axes, against three quantities."""
    panels, alone = [], len(runs) == 1
    curves = [_smooth(run.training["loss"].values) if "loss" in run.training else [] for _, run in runs]
    for axis, x_label in _AXES:
        lines: list[Line] = []
        for number, (name, run) in enumerate(runs):
            if (series := run.training.get("loss")) is not None:
                x, shown = _positions(run, series.steps, axis), "training, smoothed" if alone else name
                lines += _curve(shown, number, x, series.values, curves[number], raw=len(runs) <= _RAW)
            if (series := run.evaluation.get("loss")) is not None:
                label = "evaluation" if alone else None if "loss" in run.training else name
                x = _positions(run, series.steps, axis)
                lines.append(_line(label, 1 if alone else number, "points", x, series.values))
        panels.append(_with_events(runs, axis, x_label, "loss", lines))
    told = [
        (f"{kind} of {name}", figures["loss"])
        for name, run in runs
        for kind, figures in (("training", run.training), ("evaluation", run.evaluation))
        if "loss" in figures
    ]
    return _described("loss", "Loss", [panel for panel in panels if panel.lines], told)


def _panels(runs: Runs, names: Iterable[str]) -> list[tuple[Panel, Described]]:
    return [_panel(runs, name) for name in names]


def _panel(runs: Runs, name: str) -> tuple[Panel, Described]:
    """One figure of every run against the steps, and its courses for the description."""
    figure = name.removeprefix(_SCORE)
    y_label = _UNITS.get(name, figure.removeprefix("method.").replace("_", " "))
    lines: list[Line] = []
    described = []
    for number, (label, run) in enumerate(runs):
        series = (run.training if figure == name else run.evaluation).get(figure)
        if series is None:
            continue
        if name == "peak_memory_bytes":
            series = Series(series.steps, array("d", [value * 1e-9 for value in series.values]))
        if figure != name:
            lines.append(_line(label, number, "points", series.steps, series.values))
        elif name.startswith(_NOISY):
            curve = _smooth(series.values)
            lines += _curve(label, number, series.steps, series.values, curve, raw=len(runs) <= _RAW)
        else:
            lines.append(_line(label, number, "curve", series.steps, series.values))
        described.append((f"{y_label} of {label}", series))
    return _with_events(runs, "step", "step", y_label, lines), described


def _smooth(values: Sequence[float]) -> list[float]:
    return smoothed(values, span=max(1.0, len(values) / _SPANS))


def _curve(
    label: str, colour: int, x: Sequence[float], y: Sequence[float], curve: Sequence[float], *, raw: bool
) -> list[Line]:
    """A smoothed curve, and the values behind it where they differ and are wanted."""
    behind = [_line(None, colour, "raw", x, y)] if raw and len(y) > _SPANS else []
    return [*behind, _line(label, colour, "curve", x, curve)]


def _picture(name: str, title: str, panels: Sequence[tuple[Panel, Described]]) -> Picture:
    shown = [panel for panel, _ in panels if panel.lines]
    return _described(name, title, shown, [each for panel, series in panels if panel.lines for each in series])


def _described(name: str, title: str, panels: Sequence[Panel], series: Described) -> Picture:
    parts = [f"{title} against {', '.join(dict.fromkeys(panel.x_label for panel in panels))}."]
    for label, values in series[:_DESCRIBED]:
        if not (finite := values.finite):
            parts.append(f"{label}: no finite value.")
            continue
        (first, began), (last, ended) = finite[0], finite[-1]
        numbers = [value for _, value in finite]
        parts.append(
            f"{label}: {began:.4g} at step {first:g}, {ended:.4g} at step {last:g}, between {min(numbers):.4g} and "
            f"{max(numbers):.4g}."
        )
    if (more := len(series) - _DESCRIBED) > 0:
        parts.append(f"{more} more.")
    return Picture(name, title, " ".join(parts), panels)


def _with_events(runs: Runs, axis: Axis, x_label: str, y_label: str, lines: Sequence[Line]) -> Panel:
    events = {
        Event(mark.kind, x)
        for _, run in runs
        for mark, x in zip(run.marks, _positions(run, [mark.step for mark in run.marks], axis), strict=True)
    }
    values = [value for line in lines if line.kind != "raw" for value in line.y if math.isfinite(value)]
    logarithmic = "loss" in y_label and bool(values) and min(values) > 0 and max(values) > 100 * min(values)
    ordered = sorted(events, key=lambda event: (event.x, event.kind))
    return Panel(x_label, y_label, lines, ordered[:COLUMNS], logarithmic, from_zero=y_label in _UNITS.values())


def _line(
    label: str | None,
    colour: int,
    kind: Literal["curve", "raw", "points"],
    x: Sequence[float],
    y: Sequence[float],
) -> Line:
    lost = [place for place, value in zip(x, y, strict=True) if math.isnan(value)]
    gaps, _ = thinned(lost, lost, columns=_GAPS)
    if label is not None and len(label) > _LONGEST:
        label = f"{label[: _LONGEST // 2]}…{label[-_LONGEST // 2 :]}"
    return Line(label, colour, kind, *thinned(x, y, columns=COLUMNS), () if kind == "raw" else gaps)


def _positions(run: RunRecord, steps: Sequence[float], axis: Axis) -> list[float]:
    if axis == "step":
        return list(steps)
    return run.clock.at(steps, run.clock.evaluations if axis == "evaluations" else run.clock.seconds)


def _method_names(runs: Sequence[RunRecord]) -> list[str]:
    names = [name for name in _names(run.training for run in runs) if name.startswith("method.")]
    return sorted(names, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), names.index(name)))


def _names(groups: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in the order in which they come."""
    return list(dict.fromkeys(name for group in groups for name in group))
