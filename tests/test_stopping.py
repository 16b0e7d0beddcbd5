"""Stops by signals and by a time limit: what is saved, what the user is told; a second signal harms nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.workspace import LORA, MEZO, VAMO, Workspace, merged
from vamo_ft.assemble import evaluator as assembly
from vamo_ft.core.types import Batch, LossTerms
from vamo_ft.data import loading, sources
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.training import signals
from vamo_ft.training.checkpoint import newest_checkpoint
from vamo_ft.training.trainer import Trainer

SLOW_DISK = """
import os, time
fsync = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.02), fsync(descriptor))[1]
from vamo_ft.cli import main
main()
"""
FAST = {"evaluation": {"every": None}, "checkpoint": {"every": None}, "logging": {"every": "1 steps"}}


def status(workspace: Workspace) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((workspace.directory() / "status.json").read_text())
    return content


def checkpoints(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in (workspace.directory() / "checkpoints").glob("*"))


def test_signal_after_signal_until_the_end_of_a_real_process(workspace: Workspace) -> None:
    """The first one saves the run; those that follow, also within the save and after the last line, change nothing."""
    workspace.configure({**VAMO, **FAST, "training": {"steps": 100_000}})
    threads = {"OMP_NUM_THREADS": "1"}  # as in this process: sums depend on it
    environment = {**os.environ, **threads, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_DISK, "train", "config.yaml"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2 "):
                break
        sent, within_save = 0, False
        while process.poll() is None:
            process.send_signal(signal.SIGTERM if sent % 3 else signal.SIGINT)
            sent += 1
            within_save |= any(name.startswith(".tmp-") for name in checkpoints(workspace))
            time.sleep(0.001)
        error = process.stderr.read()
    assert process.returncode == 75, error
    assert sent > 5
    assert within_save
    assert "train tiny again with the same settings" in error
    assert (status(workspace)["state"], status(workspace)["exit_code"]) == ("stopped", 75)
    assert status(workspace)["cause"] == "SIGINT"
    checkpoint = newest_checkpoint(workspace.directory() / "checkpoints")
    assert checkpoint is not None
    assert checkpoints(workspace) == [checkpoint.path.name]
    steps = f"training.steps={checkpoint.step + 2}"
    assert workspace.train("--set", steps) == 0
    assert workspace.train("--set", steps, "--set", "run.name=whole") == 0
    assert workspace.weights() == workspace.weights("whole")


def test_a_time_limit_stops_like_a_signal(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(FAST)
    assert workspace.train("--set", "run.name=whole") == 0
    step = Trainer._step
    for first, until in ((0, 3), (3, 5)):  # each process has the whole time
        with monkeypatch.context() as patch:
            clock = SimpleNamespace(seconds=float(first * 1000))
            patch.setattr(signals, "time", SimpleNamespace(monotonic=lambda clock=clock: clock.seconds))

            def timed(self: Trainer, until: int = until, clock: SimpleNamespace = clock) -> Any:
                record = step(self)
                clock.seconds += 10 if self.state.step == until else 0
                return record

            patch.setattr(Trainer, "_step", timed)
            assert workspace.train("--set", "training.max_seconds=10") == 75
        error = capsys.readouterr().err
        assert f"stopped after step {until} by the time limit (training.max_seconds); to go on, train tiny" in error
        assert status(workspace)["cause"] == "time limit"
        assert checkpoints(workspace)[-1] == f"step-{until:08d}"
    assert workspace.train("--set", "training.max_seconds=1000") == 0
    assert workspace.weights() == workspace.weights("whole")


STEPS: dict[str, dict[str, Any]] = {
    "momentum_dropout": {
        "method": {"name": "sgd"},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.9},
        "model": {"adapter": {**LORA, "dropout": 0.2}},
    },
    "vamo_recompute": {"method": {**VAMO["method"], "source": "recompute"}},
    "mezo": {**MEZO, "method": {"name": "mezo", "probes": 2}},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_stop_within_a_step_makes_it_again(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of many passes is not waited for: nothing more is computed after the signal."""
    workspace.configure(merged(merged(STEPS[name], FAST), {"training": {"micro_batch_size": 2, "steps": 6}}))
    assert workspace.train("--set", "run.name=whole") == 0
    terms, made = VerbaliserClassification.terms, [0]
    step, steps = Trainer._step, [0]

    def counted(self: VerbaliserClassification, batch: Batch) -> LossTerms:
        made[0] += steps[0] == 4
        if made[0] == 2:  # of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return terms(self, batch)

    def numbered(self: Trainer) -> Any:
        steps[0] += 1
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(VerbaliserClassification, "terms", counted)
        patch.setattr(Trainer, "_step", numbered)
        assert workspace.train() == 75
    assert made[0] == 2
    assert "stopped within step 4 by SIGTERM; to go on" in capsys.readouterr().err
    assert checkpoints(workspace) == ["step-00000003"]
    assert workspace.train() == 0
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")


def test_an_evaluation_that_takes_all_the_time_is_not_made_again_for_ever(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process is stopped within it; for the next it just fits into the time limit, and the third goes on."""
    workspace.configure({"training": {"steps": 3}, "evaluation": {"every": "1 steps"}, "checkpoint": {"every": None}})
    assert workspace.train("--set", "run.name=whole") == 0
    evaluate, begun, ended = assembly.evaluate, 0, 0

    def slow(*arguments: Any, **keywords: Any) -> Any:
        nonlocal begun, ended
        begun += 1
        if begun % 2:
            os.kill(os.getpid(), signal.SIGTERM)
        result = evaluate(*arguments, **keywords)
        ended += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "evaluate", slow)
        codes = [workspace.train() for _ in range(8)]
    assert codes == [75] * 7 + [0]
    assert (begun, ended) == (8, 4), "at steps 0, 1, 2 and 3, each of them twice"
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")


def test_a_stop_while_a_file_is_read(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return checked(*arguments, **keywords)

    checked = sources._checked_row
    monkeypatch.setattr(sources, "_checked_row", counted)
    workspace.configure()
    assert workspace.train() == 75
    assert seen == 5
    assert "nothing to save yet: stopped in the preparation of the data by SIGTERM" in capsys.readouterr().err


def test_a_stop_while_data_is_prepared_has_nothing_to_save(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    formatted = loading.format_rows
    seen = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal seen
        for example in formatted(*arguments, **keywords):
            seen += 1
            if seen == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield example

    workspace.configure()
    with monkeypatch.context() as patch:
        patch.setattr(loading, "format_rows", counted)
        assert workspace.train() == 75
    assert seen == 5
    error = capsys.readouterr().err
    assert "nothing to save yet: stopped in the preparation of the data by SIGTERM; to go on" in error
    assert "train tiny again" in error
    assert status(workspace)["exit_code"] == 75
    assert checkpoints(workspace) == []
    assert workspace.train() == 0
    assert status(workspace)["state"] == "finished"
