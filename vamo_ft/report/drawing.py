"""Pictures as SVG for a page that may be light or dark, and as PNG."""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FuncFormatter

from vamo_ft.report.pictures import Panel, Picture

__all__ = ["draw_png", "draw_svg"]

_COLOURS = ("#0a7bc2", "#d55e00", "#12946c", "#b5539c", "#b8860b", "#7b6bd6", "#c0392b", "#6b8e23")
_STYLES = ("-", "--", ":", "-.")  # tell the runs beyond the colours apart
_INK, _DARK_INK = "#24292f", "#d0d7de"
_GREY = "#8b949e"
_RED = "#d1242f"
_PANELS_IN_A_ROW = 3
_DOTS_PER_INCH = 160
_LEGEND_CHARACTERS = 100 / 12  # in a row of it, for each inch of the figure's width


def draw_svg(picture: Picture) -> str:
    """SVG without a background, in ink that follows the reader's light or dark theme. The same picture, the same text.

    Text stays text, in the reader's own sans-serif font.
    """
    buffer = io.StringIO()
    with _quiet(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name}):  # known no other way
        figure = _draw(picture)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "var(--ink)")
    theme = f":root{{--ink:{_INK}}}@media(prefers-color-scheme:dark){{:root{{--ink:{_DARK_INK}}}}}"
    text = text.replace("<defs>", f"<style>{theme}</style><defs>", 1)
    return re.sub(r"\s*\n\s*", " ", text)


def draw_png(picture: Picture, path: Path) -> None:
    """The picture on white.

    Raises:
        OSError: the file cannot be written.
    """
    with _quiet():
        figure = _draw(picture)
        figure.suptitle(picture.title, color=_INK).set_parse_math(False)
        figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": ""})


@contextmanager
def _quiet() -> Iterator[None]:
    """A name in letters that the font lacks is drawn as boxes, which is no news for a terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield


def _draw(picture: Picture) -> Figure:
    columns = min(_PANELS_IN_A_ROW, len(picture.panels))
    rows = -(-len(picture.panels) // columns)
    labels = [line.label for line in picture.panels[0].lines if line.label is not None]
    width = max(6.0, 4.0 * columns)
    longest = max(map(len, labels), default=1) + 6  # with the line before it
    in_a_row = max(1, min(len(labels) + 3, int(width * _LEGEND_CHARACTERS / longest)))
    height = 3.0 * rows + 0.22 * (1 + len(labels) // in_a_row)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Artist] = {}
    for number, panel in enumerate(picture.panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw_panel(axes, panel)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    if handles:
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=in_a_row,
            fontsize="small",
            frameon=False,
            labelcolor=_INK,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a `$` in a name is a `$`
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        colour = _COLOURS[line.colour % len(_COLOURS)]
        style = _STYLES[line.colour // len(_COLOURS) % len(_STYLES)]
        label = None if line.label is None else f" {line.label}"  # one that begins with _ would be left out
        if line.kind == "raw":
            axes.plot(line.x, line.y, color=colour, linewidth=0.7, alpha=0.3)
        elif line.kind == "points":
            marker = "o" if len(line.x) <= 60 else ""
            axes.plot(line.x, line.y, style, color=colour, marker=marker, markersize=3.5, linewidth=1.0, label=label)
        else:
            marker = "." if len(line.x) == 1 else ""
            axes.plot(line.x, line.y, style, color=colour, marker=marker, linewidth=1.5, label=label)
    bottom = axes.get_xaxis_transform()
    if gaps := [x for line in panel.lines for x in line.gaps]:
        places = [0.0] * len(gaps)
        axes.plot(gaps, places, "x", color=_RED, markersize=3.5, transform=bottom, clip_on=False, label="not finite")
    for kind, colour, dashes in (("resume", _GREY, (1.0, 2.0)), ("rollback", _RED, (4.0, 2.0))):
        if places := [event.x for event in panel.events if event.kind == kind]:
            marks = axes.vlines(places, 0, 1, transform=bottom, colors=colour, linewidth=1.0, label=kind)
            marks.set_linestyle((0.0, dashes))
    axes.set_xlabel(panel.x_label, color=_INK, fontsize="small")
    axes.set_ylabel(panel.y_label, color=_INK, fontsize="small").set_parse_math(False)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    if panel.logarithmic:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if panel.from_zero:
        largest = max((y for line in panel.lines for y in line.y if math.isfinite(y)), default=0.0)
        axes.set_ylim(0, 1.08 * largest or 1.0)
    axes.tick_params(colors=_INK, labelsize="small", which="both")
    axes.grid(visible=True, color=_GREY, alpha=0.25, linewidth=0.6)
    for place, spine in axes.spines.items():
        spine.set_visible(place in ("left", "bottom"))
        spine.set_color(_GREY)
    offset: Text = axes.yaxis.get_offset_text()
    offset.set_color(_INK)


def _short(value: float, position: int | None) -> str:
    """`1.5k`, and `0.5` in full."""
    return f"{value:g}" if abs(value) < 1000 else EngFormatter(sep="")(value)
