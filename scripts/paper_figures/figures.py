"""From results to files: the numbers as JSON, the curves as a picture with three panels."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vamo_ft.report.curves import Curve, Panel, draw_panels
from vamo_ft.studies.curves import ArmResult, band, summary
from vamo_ft.training.sinks import finite

EVALUATIONS = "sample evaluations: forward + 2 x backward"


def write_results(
    name: str, title: str, arms: Sequence[ArmResult], *, facts: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Writes `<name>.json` with every point, `<name>.summary.json` and `<name>.png`; returns the summary."""
    out.mkdir(parents=True, exist_ok=True)
    numbers = {"title": title, **facts, **summary(arms)}
    _write_json(out / f"{name}.json", {**numbers, "arms": [asdict(arm) for arm in arms]})
    _write_json(out / f"{name}.summary.json", numbers)
    by_step = [band(arm, lambda point: point.step) for arm in arms]
    by_work = [band(arm, lambda point: point.evaluations) for arm in arms]
    by_time = [band(arm, lambda point: point.seconds) for arm in arms]
    panels = [
        Panel("steps", [Curve(**asdict(each)) for each in by_step]),
        Panel(EVALUATIONS, [Curve(**asdict(each)) for each in by_work], logarithmic=True),
        Panel("seconds", [Curve(**asdict(each)) for each in by_time], logarithmic=True),
    ]
    start = max(curve.middle[0] for curve in by_step)
    draw_panels(panels, out / f"{name}.png", title=title, y_label="training loss", ceiling=1.3 * start)
    return numbers


def table(numbers: dict[str, Any]) -> str:
    """The summary as lines of text, in Markdown."""
    lines = [
        f"{numbers['title']}; equal evaluations: {numbers['budget']:,}",
        "",
        "| method | step size | loss after the same steps | at the same evaluations | evaluations | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in numbers["methods"]:
        edge = " (edge of its grid)" if row["learning_rate_at_edge"] else ""
        lines.append(
            f"| {row['label']} | {row['learning_rate']:g}{edge} | {_spread(row['equal_steps'])} | "
            f"{_spread(row['equal_evaluations'])} | {row['evaluations']:,.0f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def _spread(spread: dict[str, float | None]) -> str:
    if spread["mean"] is None:
        return "-"
    return f"{spread['mean']:.4f}" + ("" if spread["deviation"] is None else f" ± {spread['deviation']:.4f}")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
