from pathlib import Path

import pytest

from vamo_ft.report.plots import Band, ErrorPanel, VariancePanel, draw_diagnosis

ERRORS = ErrorPanel(
    label="eps",
    sizes=[1e-4, 1e-3, 1e-2],
    errors={"central": [0.3, 0.01, 0.2], "forward": [0.5, 0.1, 0.4]},
    usable=(1e-3, 1e-2),
    recommended=1e-3,
    configured=1e-2,
)
VARIANCE = VariancePanel(
    ages=[0, 1, 2], ratios={"alpha 1": Band([0.5, 0.6, 0.9], [0.4, 0.5, 0.8], [0.6, 0.7, 1.0])}, same_compute=0.4
)


def size(path: Path) -> tuple[int, int]:
    """Width and height in a PNG's header."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize("variance", [None, VARIANCE])
def test_a_second_panel_makes_the_picture_twice_as_wide(variance: VariancePanel | None, tmp_path: Path) -> None:
    draw_diagnosis(tmp_path / "a.png", errors=ERRORS, variance=variance)
    width, height = size(tmp_path / "a.png")
    assert (width, height) == (720 if variance is None else 1440, 504)


def test_the_picture_shows_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    draw_diagnosis(tmp_path / "a.png", errors=ERRORS, variance=VARIANCE)
    left, right = drawn[0].axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[0.3, 0.01, 0.2], [0.5, 0.1, 0.4]]
    assert {line.get_xdata()[0] for line in left.lines[2:]} == {1e-3, 1e-2}
    assert list(right.lines[0].get_ydata()) == [0.5, 0.6, 0.9]
    assert right.lines[1].get_ydata()[0] == 0.4
    assert len(right.collections) == 1  # the interval


def test_nothing_is_drawn_through_global_state() -> None:
    import sys

    assert "matplotlib.pyplot" not in sys.modules
