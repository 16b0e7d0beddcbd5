import pytest

from vamo_ft.commands.methods import COLUMNS, LEGEND, METHODS, methods
from vamo_ft.config.method import METHOD_NAMES


def test_every_method_is_listed() -> None:
    assert {summary.name.split(",")[0] for summary in METHODS} == set(METHOD_NAMES)


def test_one_line_each_within_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    methods()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 1 + len(METHODS) + 1 + len(LEGEND)
    assert lines[0].split() == list(COLUMNS)
    row = next(line for line in lines if line.startswith("mezo"))
    assert row.split() == ["mezo", "loss", "differences", "2q", "0", "-", "one", "layer", "2305.17333"]
    assert "\x1b" not in "".join(lines)
