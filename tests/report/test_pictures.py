import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.report.runs import evaluation_line, training_line, write_run
from vamo_ft.report.collect import RunRecord, collect_run
from vamo_ft.report.drawing import draw_png, draw_svg
from vamo_ft.report.pictures import COLUMNS, Event, Picture, pictures_of


def collect(directory: Path) -> RunRecord:
    return collect_run(directory, held=False, text=str)


def named(pictures: list[Picture]) -> dict[str, Picture]:
    return {picture.name: picture for picture in pictures}


def test_one_run(tmp_path: Path) -> None:
    pictures = named(pictures_of([collect(write_run(tmp_path / "a"))], labels=["a"]))
    assert list(pictures) == ["loss", "eval_accuracy", "learning_rate", "method", "resources"]
    steps, evaluations, seconds = pictures["loss"].panels
    assert [(line.label, list(line.x)) for line in steps.lines] == [
        ("training, smoothed", [2, 4]),
        ("evaluation", [0, 4]),
    ]
    assert [list(line.x) for line in evaluations.lines] == [[80, 160], [0, 160]]
    assert [list(line.x) for line in seconds.lines] == [[1, 2], [0, 2]]
    assert list(steps.lines[0].y) == [2.0, 1.0]
    assert [panel.y_label for panel in pictures["method"].panels] == ["alpha", "correlation"]
    memory = pictures["resources"].panels[1]
    assert (list(memory.lines[0].y), memory.y_label, memory.from_zero) == ([1.5, 1.5], "peak memory (GB)", True)
    assert pictures["loss"].description == (
        "Loss against step, sample evaluations (forward + 2 backward), seconds. training of a: 2 at step 2, 1 at step "
        "4, between 1 and 2. evaluation of a: 5 at step 0, 2 at step 4, between 2 and 5."
    )


def test_several_runs_share_their_axes(tmp_path: Path) -> None:
    lines = [training_line(step) for step in range(1, 4)]
    for line in lines:
        del line["method.alpha"]
    runs = [collect(write_run(tmp_path / "a")), collect(write_run(tmp_path / "b", lines))]
    pictures = named(pictures_of(runs, labels=["a", "b"]))
    first = pictures["loss"].panels[0]
    assert [(line.label, line.colour, line.kind) for line in first.lines] == [
        ("a", 0, "curve"),
        (None, 0, "points"),
        ("b", 1, "curve"),
    ]
    alpha, correlation = pictures["method"].panels
    assert [line.label for line in alpha.lines] == ["a"]
    assert [line.label for line in correlation.lines] == ["a", "b"]


def test_a_legend_lies_within_its_picture(tmp_path: Path) -> None:
    labels = [f"adamw-lr0.00{number}-seed{number}" for number in range(5)]
    runs = [collect(write_run(tmp_path / label)) for label in labels]
    for picture in pictures_of(runs, labels=labels):
        svg = draw_svg(picture)
        width = float(re.findall(r'viewBox="0 0 ([\d.]+) ', svg)[0])
        entries = re.findall(r'<text[^>]* x="(-?[\d.]+)"[^>]*> adamw', svg)
        assert len(entries) == len(labels)
        assert all(0 <= float(x) < width - 90 for x in entries), picture.name


def test_marks_stand_where_they_happened(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a")
    event = json.dumps({"step": 2, "event": "rollback", "message": ""})
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"{event}\n")
    panels = pictures_of([collect(directory)], labels=["a"])[0].panels
    assert [list(panel.events) for panel in panels] == [[Event("rollback", x)] for x in (2, 80, 1)]


def test_100_000_lines_become_few_points_and_no_extreme_is_lost(tmp_path: Path) -> None:
    count = 100_000
    lines = (
        {
            "step": step,
            "loss": 50.0 if step == 12_345 else None if step % 1_000 == 0 else 1.0 + step % 7,
            "forward_evals": 8 * step,
            "seconds": 0.1 * step,
            "method.alpha": 0.5,
        }
        for step in range(1, count + 1)
    )
    pictures = pictures_of([collect(write_run(tmp_path / "a", lines))], labels=["a"])
    drawn = [line for picture in pictures for panel in picture.panels for line in panel.lines]
    assert max(len(line.x) for line in drawn) <= 2 * (COLUMNS + 1)
    raw, curve = named(pictures)["loss"].panels[0].lines
    assert (raw.kind, max(y for y in raw.y if math.isfinite(y)), raw.x[-1]) == (
        "raw",
        50.0,
        pytest.approx(count, rel=1e-3),
    )
    assert 0 < len(curve.gaps) <= 102
    svg = draw_svg(pictures[0])
    assert len(svg) < 400_000


def test_a_loss_that_runs_away_is_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    lines = [training_line(1), training_line(2, loss=1e6), training_line(3, loss=None), evaluation_line(3, 1e7, 0.5)]
    picture = pictures_of([collect(write_run(tmp_path / "a", lines))], labels=["a"])[0]
    assert [panel.logarithmic for panel in picture.panels] == [True] * 3
    assert list(picture.panels[0].lines[0].gaps) == [3] or list(picture.panels[0].lines[1].gaps) == [3]


NAMES = ["<script>alert(1)</script>", "$\\frac{1}$ & $x$", "_hidden", "日本語", "a" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    run = collect(write_run(tmp_path / "a"))
    picture = pictures_of([run, run], labels=[name, "other"])[0]
    root = ElementTree.fromstring(draw_svg(picture))
    texts = ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")]
    assert (name if len(name) < 40 else "a" * 20 + "…" + "a" * 20) in texts
    draw_png(picture, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_picture_in_the_readers_colours(tmp_path: Path) -> None:
    picture = pictures_of([collect(write_run(tmp_path / "a"))], labels=["a"])[0]
    svg = draw_svg(picture)
    assert svg == draw_svg(picture)
    assert "prefers-color-scheme:dark" in svg
    assert svg.count("var(--ink)") > 10
