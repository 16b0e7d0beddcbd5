"""Informed directions: what does not fit is refused before training, and the size of their probes is a radius."""

import pytest

from tests.workspace import Workspace
from vamo_ft.assemble import directions


def test_a_sketch_that_does_not_fit_is_refused_with_the_figure(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    informed = {"structure": "gradient_subspace", "warmup_steps": 9}
    workspace.configure({"method": {"name": "vamo", "probes": 8, "directions": informed}})
    numel = 35_168  # of the tiny model
    for free, code in ((4 * 25 * numel - 1, 2), (4 * 25 * numel, 0)):
        monkeypatch.setattr(directions, "free_memory_bytes", lambda device, free=free: free)
        assert workspace.train("--fresh") == code
        said = capsys.readouterr().err
        assert (code == 0) == ("gradient_subspace keeps" not in said)
        if code == 2:
            assert f"gradient_subspace keeps 25 float32 vectors of {numel:,} elements, 0.00352 GB" in said
            assert "lower method.probes" in said


def test_the_size_that_auto_finds_has_its_own_name(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    informed = {"structure": "gradient_subspace", "warmup_steps": 3}
    workspace.configure({"method": {"name": "vamo", "probes": 2, "directions": informed}, "training": {"steps": 4}})
    assert workspace.train() == 0
    said = "".join(capsys.readouterr())
    assert "radius: auto chose " in said
    assert "eps: " not in said


def test_a_size_that_moves_no_loss_is_called_so_too(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    informed = {"structure": "gradient_subspace", "warmup_steps": 3}
    method = {"name": "vamo", "probes": 2, "radius": 1e-30, "directions": informed}
    workspace.configure({"method": method, "training": {"steps": 4}})
    assert workspace.train() == 1
    assert "(method.radius too small for the precision" in capsys.readouterr().err
