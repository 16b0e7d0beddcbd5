"""`vamo-ft report`: run directories as one page and as pictures."""

import time
from collections.abc import Sequence
from pathlib import Path

from vamo_ft.commands.secrets import masked
from vamo_ft.core.errors import UsageError
from vamo_ft.report.collect import RunRecord, collect_run, is_run
from vamo_ft.report.drawing import draw_png
from vamo_ft.report.pictures import pictures_of
from vamo_ft.report.render import render_page
from vamo_ft.training.lease import living_holder

__all__ = ["report", "write_report"]

_PAGE = "report.html"


def report(directories: Sequence[Path], *, out: Path | None, png: Path | None) -> None:
    """Writes the page, and prints where.

    Args:
        directories: of runs, finished or not; each counts once.
        out: the page's file; None: `report.html` in the run directory, or in the working directory for several runs.
        png: folder for the pictures as PNG files; None: no such files.

    Raises:
        UsageError: a folder is no run directory or cannot be read, or a file cannot be written.
    """
    once: dict[Path, Path] = {}
    for directory in directories:
        once.setdefault(directory.resolve(), directory)
        if not is_run(directory):
            raise UsageError(f"{directory}: {_what_else(directory)}")
    directories = list(once.values())
    if out is None:
        out = directories[0] / _PAGE if len(directories) == 1 else Path(_PAGE)
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder; name a file in it, such as {out / _PAGE}")
    for path in write_report(directories, out=out, png=png):
        print(path)


def write_report(directories: Sequence[Path], *, out: Path, png: Path | None = None) -> list[Path]:
    """Writes the page to `out`, and the pictures to the folder `png` where it is given.

    Returns:
        The files.

    Raises:
        UsageError: a run cannot be read, or a file cannot be written.
    """
    runs = [_collect(directory) for directory in directories]
    labels = _labels(runs)
    pictures = pictures_of(runs, labels=labels)
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render_page(runs, pictures, labels=labels), encoding="utf-8")
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                written.append(png / f"{picture.name}.png")
                draw_png(picture, written[-1])
    except OSError as error:
        raise UsageError(f"{error.filename or out}: cannot be written ({error.strerror}); name another place") from None
    return written


def _what_else(directory: Path) -> str:
    """Why a folder is no run, and where its runs are, if it holds some."""
    if not directory.is_dir():
        return "no such folder"
    for pattern in ("*", "runs/*"):  # those of a comparison are in runs
        if any(map(is_run, directory.glob(pattern))):
            return f"is not a run directory; its runs are {directory / pattern}"
    return "is not a run directory: it has neither config.yaml nor metrics.jsonl"


def _collect(directory: Path) -> RunRecord:
    holder, _ = living_holder(directory / ".lease.json", now=time.time())
    try:
        return collect_run(directory, held=holder is not None, text=_shown)
    except OSError as error:
        raise UsageError(f"{directory / 'metrics.jsonl'}: cannot be read ({error.strerror})") from None


def _shown(text: str) -> str:
    """Without secrets, and without what neither a page nor a picture may hold."""
    text = masked(text)
    return (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    )


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Names where they tell the runs apart, else paths; numbered where those do not either."""
    for labels in ([run.name for run in runs], [run.path for run in runs]):
        if len(set(labels)) == len(labels):
            return labels
    return [f"{run.path} ({number})" for number, run in enumerate(runs, start=1)]
