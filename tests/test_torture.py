"""The torture: that it notices what it is there for, and a short one. The long one is `scripts/torture`."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.torturing import __main__ as command
from scripts.torturing.attacks import ATTACKS
from scripts.torturing.cases import CASES, run_directory
from scripts.torturing.damage import damage_a_file, dead_leases, foreign_lease
from scripts.torturing.outcome import differences, read_outcome
from scripts.torturing.places import place_of
from scripts.torturing.process import ROOT
from scripts.torturing.rounds import Plan, RoundResult, plan_round, run_round
from scripts.torturing.summary import summary
from scripts.torturing.trial import Loss, Trial
from vamo_ft.core.errors import DataError
from vamo_ft.training.checkpoint import open_checkpoint, save_checkpoint
from vamo_ft.training.lease import living_holder

LINES = [
    {"step": 0, "eval.loss": 2.0, "eval.seconds": 0.1},
    {"step": 2, "loss": 1.0, "seconds": 1.5, "tokens_per_second": 10.0, "peak_memory_bytes": 1000},
    {"step": 4, "loss": 0.5, "seconds": 2.5, "tokens_per_second": 11.0, "peak_memory_bytes": 1000},
]


def write_lines(directory: Path, lines: list[dict[str, Any]]) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(directory: Path) -> Path:
    for folder in ("model", "checkpoints/step-00000002", "checkpoints/step-00000004"):
        (directory / folder).mkdir(parents=True)
        (directory / folder / "MANIFEST.json").write_text("{}")
    (directory / "model" / "model.safetensors").write_bytes(bytes(range(256)))
    (directory / "seedlog.bin").write_bytes(b"log")
    (directory / "status.json").write_text('{"state": "finished"}')
    write_lines(directory, LINES)
    return directory


def flip_a_weight(directory: Path) -> None:
    file = directory / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[77] ^= 1
    file.write_bytes(content)


LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a weight": (flip_a_weight, "the final weights differ"),
    "the weights": (lambda run: (run / "model" / "model.safetensors").unlink(), "the final weights differ"),
    "a step": (lambda run: write_lines(run, LINES[:1] + LINES[2:]), 'metrics.jsonl:2: {"step": 4'),
    "the last step": (lambda run: write_lines(run, LINES[:2]), "metrics.jsonl:3: nothing instead of"),
    "a step twice": (lambda run: write_lines(run, [*LINES, LINES[2]]), "instead of nothing"),
    "another loss": (lambda run: write_lines(run, [*LINES[:2], {**LINES[2], "loss": 0.5000001}]), "metrics.jsonl:3"),
    "the seed log": (lambda run: (run / "seedlog.bin").unlink(), "seedlog.bin differs"),
    "the state": (lambda run: (run / "status.json").write_text('{"state": "running"}'), "status.json says running"),
    "half a checkpoint": (lambda run: (run / "checkpoints" / ".tmp-step-00000004").mkdir(), "files are left over"),
    "a file": (lambda run: (run / "checkpoints" / "step-00000004" / "MANIFEST.json").unlink(), "files are missing"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_seen(name: str, tmp_path: Path) -> None:
    reference, run = make_run(tmp_path / "reference"), make_run(tmp_path / "run")
    change, message = LOSSES[name]
    change(run)
    assert message in "; ".join(differences(read_outcome(reference), read_outcome(run)))


def test_times_and_earlier_attempts_are_no_loss(tmp_path: Path) -> None:
    reference, run = make_run(tmp_path / "reference"), make_run(tmp_path / "run")
    write_lines(run, [{**line, **{name: 7.0 for name in line if "second" in name}} for line in LINES])
    (run / "metrics.discarded.jsonl").write_text("{}\n")
    (run / "checkpoints" / "step-00000002").rename(run / "checkpoints" / "step-00000003")
    assert differences(read_outcome(reference), read_outcome(run)) == []


def test_a_run_without_weights_is_no_reference(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "model" / "model.safetensors").unlink()
    assert differences(read_outcome(run), read_outcome(run)) != []


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    make_run(run_directory(tmp_path))
    return Trial(tmp_path, tmp_path / "case.yaml", chance=random.Random(0), first_start=0)


def test_wrong_answers_of_a_process_are_losses(trial: Trial) -> None:
    def ended(code: int, output: str) -> Any:
        return SimpleNamespace(exit_code=code, output=output, began=True)

    trial.check(ended(75, "stopped"), allowed={0, 75})
    with pytest.raises(Loss, match="exit code 1 instead of"):
        trial.check(ended(1, ""), allowed={0, 75})
    with pytest.raises(Loss, match="'Traceback' was shown"):
        trial.check(ended(0, "Traceback (most recent call last):"), allowed={0})
    newest = trial.intact()[0]
    assert newest.name == "step-00000004"
    trial.check_where_it_went_on(ended(0, "going on from runs/run/checkpoints/step-00000004"), newest)
    with pytest.raises(Loss, match="did not go on from step-00000004"):
        trial.check_where_it_went_on(ended(0, "going on from runs/run/checkpoints/step-00000002"), newest)


def test_a_checkpoint_that_vanishes_is_a_loss(trial: Trial) -> None:
    newest, older = trial.intact()
    with trial.nothing_lost():
        newest.rename(newest.with_name(f".replaced-{newest.name}"))
    trial.remember_damage(trial.intact()[0])
    assert trial.intact() == [older]
    with pytest.raises(Loss, match="the checkpoint of step 2 is gone, the newest is of step 0"), trial.nothing_lost():
        older.rename(older.with_name(f".tmp-{older.name}"))


def test_every_damage_is_one(tmp_path: Path) -> None:
    seen = set()

    def save_model(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(bytes(99))

    for seed in range(60):
        checkpoint = save_checkpoint(
            tmp_path / str(seed),
            step=3,
            owners={"estimator": {"table": torch.arange(9.0)}},
            save_model=save_model,
            facts={},
            keep=1,
        )
        open_checkpoint(checkpoint)
        damage = damage_a_file(checkpoint, random.Random(seed))
        seen.add((damage.kind, damage.part))
        with pytest.raises(DataError, match=Path(damage.file).name):
            open_checkpoint(checkpoint)
    assert len(seen) == 9


def test_leases_are_what_they_are_called(tmp_path: Path) -> None:
    lease = tmp_path / "lease.json"
    for text in dead_leases().values():
        lease.write_text(text)
        holder, note = living_holder(lease, now=lease.stat().st_mtime)
        assert holder is None and note is not None
    lease.write_text(foreign_lease())
    assert living_holder(lease, now=lease.stat().st_mtime + 100)[0] is not None
    assert living_holder(lease, now=lease.stat().st_mtime + 200)[0] is None


def test_a_stack_tells_the_place() -> None:
    def stack(*frames: str) -> str:
        return "\n".join(["Current thread 0x1 (most recent call first):", *frames])

    train = 'File "/x/vamo_ft/training/trainer.py", line 75 in train'
    step = 'File "/x/vamo_ft/training/trainer.py", line 90 in _step'
    assert place_of(stack('File "/x/torch/a.py", line 1 in f', step, train)) == "step"
    assert place_of(stack('File "/x/vamo_ft/estimators/snapshot.py", line 9 in complete', step, train)) == "snapshot"
    assert place_of(stack('File "/x/vamo_ft/training/checkpoint.py", line 9 in save_checkpoint', train)) == "save"
    assert place_of(stack('File "<frozen importlib>", line 9 in load', 'File "/x/vamo_ft/cli.py", line 60 in run')) == (
        "imports"
    )
    assert place_of(stack('File "<frozen importlib>", line 9 in load')) is None


def test_a_hundred_rounds_see_every_attack_on_every_case() -> None:
    plans = [plan_round(number, seed=5, cases=list(CASES)) for number in range(100)]
    assert {(plan.case, plan.attacks[0]) for plan in plans} == {(case, attack) for case in CASES for attack in ATTACKS}
    assert plans == [plan_round(number, seed=5, cases=list(CASES)) for number in range(100)]
    assert plans != [plan_round(number, seed=6, cases=list(CASES)) for number in range(100)]


def test_a_lost_round_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(trial: Trial) -> None:
        trial.hits.append(("kill -9", "save"))
        raise Loss("a step is gone")

    monkeypatch.setitem(ATTACKS, "lose", lose)
    result = run_round(tmp_path, Plan(seed=1, number=2, case="mezo", attacks=("lose",)))
    assert (result.loss, result.hits) == ("a step is gone", (("kill -9", "save"),))
    assert result.folder.is_dir()


def test_a_loss_is_told_and_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def round_of(root: Path, plan: Plan) -> RoundResult:
        return RoundResult(plan, root, hits=(("kill -9", "save"),), loss="a step" if plan.number == 1 else None)

    monkeypatch.setattr(command, "prepare", lambda root: None)
    monkeypatch.setattr(command, "run_reference", lambda root, case: None)
    monkeypatch.setattr(command, "run_round", round_of)
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs))
    with pytest.raises(SystemExit) as exit:
        command.main(["--rounds=3", "--seed=4", "--cases=mezo,vamo", f"--folder={tmp_path}"])
    assert exit.value.code == 1
    told = capsys.readouterr().out
    assert "LOST in round 1: a step" in told
    assert "scripts/torture --seed 4 --round 1 --cases mezo,vamo" in told
    assert "1 rounds lost something" in told
    assert len(list(tmp_path.iterdir())) == 1
    command.main(["--round=2", f"--folder={tmp_path}"])
    assert len(list(tmp_path.iterdir())) == 1


def test_the_summary_counts() -> None:
    plans = [Plan(0, 0, "mezo", ()), Plan(0, 1, "vamo", ())]
    hits = [(("kill -9", "save"), ("SIGTERM", "step")), (("kill -9", "snapshot"),)]
    results = [RoundResult(plan, Path(), hits=hit, starts={"forked": 2}) for plan, hit in zip(plans, hits, strict=True)]
    table = [line.split() for line in summary(results, cases=["mezo", "vamo"]).splitlines()]
    assert ["kill", "-9", "1", "1", "2"] in table
    assert ["kill", "-9", "1", "1", ".", "2"] in table
    assert ["SIGTERM", ".", ".", "1", "1"] in table
    assert "2 rounds, 3 attacks, 4 processes (4 forked), 2 of them resumes or refusals" in " ".join(table[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_rounds_lose_nothing(tmp_path: Path) -> None:
    """One of each case, by real processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.torturing", "--rounds=5", "--seed=96", f"--folder={tmp_path}"],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 rounds lost something" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_wrapper_runs_the_module() -> None:
    text = (ROOT / "scripts" / "torture").read_text(encoding="utf-8")
    assert os.access(ROOT / "scripts" / "torture", os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert text.splitlines()[-2:] == ["scripts/setup", 'exec .venv/bin/python -m scripts.torturing "$@"']
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / "torture"], check=False).returncode == 0
