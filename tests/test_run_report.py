"""The page of real runs: at the end of training, and of runs that stopped, went back or still go on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_divergence import ROLLBACK, is_step, spoil
from tests.workspace import PLAIN, Workspace, interrupt_at, merged
from vamo_ft.cli import run
from vamo_ft.commands import report
from vamo_ft.training.rundir import RunDirectory
from vamo_ft.training.trainer import Trainer

REPORT = {"logging": {"every": "1 steps", "report": True}}


def test_a_finished_run_has_its_page(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(REPORT, ROLLBACK))
    page = workspace.directory() / "report.html"
    with monkeypatch.context() as patch:
        interrupt_at(patch, Trainer, "_step", 2)
        assert workspace.train() == 75
    assert not page.exists()
    assert run(["report", "runs/tiny"]) == 0
    assert "To go on: <code>vamo-ft train runs/tiny/config.yaml</code>" in page.read_text(encoding="utf-8")
    spoil(monkeypatch, is_step(4))
    assert run(["train", "runs/tiny/config.yaml"]) == 0
    assert capsys.readouterr().out.endswith("report: runs/tiny/report.html\n")
    text = page.read_text(encoding="utf-8")
    assert text.count("<li>resumed from step 1</li>") == text.count("<li>resumed from step") == 1
    assert text.count("<li>rollback to step 3: step 5: the loss is nan") == 1
    assert 'class="state good">finished' in text


def test_a_page_that_cannot_be_written_fails_no_run(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directories: Sequence[Path], **_: Any) -> list[Path]:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "write_report", fail)
    workspace.configure(REPORT)
    assert workspace.train("--set", "training.steps=1") == 0
    warning = "runs/tiny/report.html: cannot be written (RuntimeError: no fonts)"
    assert warning in (workspace.directory() / "log.txt").read_text()


def test_a_page_that_is_missing_is_written_when_the_run_is_asked_for_again(workspace: Workspace) -> None:
    workspace.configure(merged(REPORT, {"training": {"steps": 1}}))
    assert workspace.train() == 0
    page = workspace.directory() / "report.html"
    page.unlink()  # as where the process was killed between its last steps
    assert workspace.train() == 0
    assert 'class="state good">finished' in page.read_text(encoding="utf-8")


def test_no_page_where_none_is_wanted(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(merged(PLAIN, {"training": {"steps": 1}, "logging": {"report": False}}))
    assert workspace.train() == 0
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].endswith(" GB"), "one line, as wide as it is"
    assert last[1:] == ["model: runs/tiny/model", "next:  vamo-ft export runs/tiny tiny-model"]
    assert run(["export", "runs/tiny/model", "tiny-model"]) == 2
    assert "runs/tiny/model: this is the model in a run directory; name runs/tiny\n" in capsys.readouterr().err
    assert not (workspace.directory() / "report.html").exists()


@pytest.mark.parametrize("held", [True, False])
def test_a_run_that_goes_on_is_told_from_one_that_crashed(workspace: Workspace, held: bool) -> None:
    workspace.configure({"training": {"steps": 1}})
    assert workspace.train() == 0
    directory = RunDirectory(workspace.directory())
    directory.lock()
    directory.write_status("running")
    if not held:
        directory.unlock()
    assert run(["report", "runs/tiny"]) == 0
    if held:
        directory.unlock()
    text = directory.report.read_text(encoding="utf-8")
    assert f">{'running' if held else 'crashed'}</span>" in text
    assert ("vamo-ft train" in text) is not held
