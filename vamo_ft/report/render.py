"""One HTML page that needs nothing but itself: no script, and no request to anywhere."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from vamo_ft.report.collect import RunRecord
from vamo_ft.report.drawing import draw_svg
from vamo_ft.report.figures import Fact, differences, facts_of, next_commands
from vamo_ft.report.pictures import Picture
from vamo_ft.report.style import STYLE

__all__ = ["render_page"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MISSING = "–"
_GOOD, _BAD = ("finished", "running"), ("crashed", "failed", "diverged", "out_of_memory")


def render_page(runs: Sequence[RunRecord], pictures: Iterable[Picture], *, labels: Sequence[str]) -> str:
    """The page; every text of the runs is escaped.

    Args:
        runs: at least one.
        labels: of the runs, all different.
    """
    title = f"{labels[0]} · vamo-ft report" if len(runs) == 1 else f"{len(runs)} runs · vamo-ft report"
    heading = labels[0] if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(heading)}</h1>",
    ]
    if len(runs) == 1:
        parts.append(_facts(runs[0]))
    else:
        parts += ["<h2>Results</h2>", _results(runs, labels)]
        if rows := differences(runs):
            parts += ["<h2>Configuration: what differs</h2>", _table(["key", *labels], rows)]
    parts.append("<h2>Pictures</h2>")
    figures = [_figure(picture) for picture in pictures]
    parts += figures or ["<p>No metrics are written yet.</p>"]
    parts.append("<h2>About the run</h2>" if len(runs) == 1 else "<h2>About the runs</h2>")
    parts += [_about(run, label, alone=len(runs) == 1) for run, label in zip(runs, labels, strict=True)]
    parts.append("</main></body></html>\n")
    return "\n".join(parts)


def _facts(run: RunRecord) -> str:
    items = [f"<div><dt>{escape(fact.name)}</dt><dd>{_value(fact)}</dd></div>" for fact in facts_of(run)]
    return f'<dl class="facts">{"".join(items)}</dl>'


def _results(runs: Sequence[RunRecord], labels: Sequence[str]) -> str:
    """One row a run, and a column for everything that one of them has."""
    facts = [{fact.name: fact for fact in facts_of(run)} for run in runs]
    columns = list(dict.fromkeys(name for of_run in facts for name in of_run))
    rows = []
    for label, of_run in zip(labels, facts, strict=True):
        cells = [f'<th scope="row">{escape(label)}</th>']
        for name in columns:
            fact = of_run.get(name)
            kind = ' class="number"' if fact is None or fact.is_number else ""
            cells.append(f"<td{kind}>{_MISSING if fact is None else _value(fact)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _wrapped(["run", *columns], rows)


def _table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    return _wrapped(
        columns,
        [
            f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
            for name, values in rows
        ],
    )


def _wrapped(columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>'


def _value(fact: Fact) -> str:
    return _state(fact.value) if fact.name == "state" else escape(fact.value)


def _state(state: str) -> str:
    kind = "good" if state in _GOOD else "bad" if state in _BAD else "other"
    return f'<span class="state {kind}">{escape(state.replace("_", " "))}</span>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(draw_svg(picture).encode()).decode()
    return (
        f'<figure id="{escape(picture.name)}"><figcaption>{escape(picture.title)}</figcaption>'
        f'<img alt="{escape(picture.description)}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _about(run: RunRecord, label: str, *, alone: bool) -> str:
    """How the run ended, what can be done with it, what happened on the way, and its settings."""
    parts = ["<section>"] if alone else [f"<section><h3>{escape(label)}</h3>"]
    if not alone:
        parts.append(f"<p>{_state(run.state)} {escape(run.path)}</p>")
    if run.time is not None:
        parts.append(f'<p class="quiet">{escape(run.state.replace("_", " "))}; written {escape(run.time)}</p>')
    if run.message is not None:
        parts.append(f'<p class="message">{escape(run.message)}</p>')
    parts += [f"<p>To {escape(purpose)}: <code>{escape(command)}</code></p>" for purpose, command in next_commands(run)]
    events = [*[mark.text for mark in run.marks], *run.notes]
    if events:
        parts.append(f"<ul>{''.join(f'<li>{escape(event)}</li>' for event in events)}</ul>")
    for title, values in (("Configuration", run.config), ("Environment", run.environment)):
        if values:
            table = _table(["key", "value"], [(key, [value]) for key, value in values.items()])
            parts.append(f"<details><summary>{title}</summary>{table}</details>")
    return "".join([*parts, "</section>"])
