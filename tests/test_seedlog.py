"""Weights rebuilt from a base model and a seed log, and logs of runs that were killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_model_folder, tiny_bert_classifier, tiny_llama
from tests.workspace import ADAMW, LORA, MEZO, Workspace, equal_weights, export, merged

RUNS: dict[str, dict[str, Any]] = {
    "mezo_decay_warmup": {
        "optimizer": {"weight_decay": 0.1},
        "schedule": {"name": "linear", "warmup_steps": 2},
    },
    "bfloat16_sphere_clipped": {
        "model": {"dtype": "bfloat16"},
        "method": {"probes": 3, "directions": {"distribution": "sphere"}},
        "optimizer": {"weight_decay": 0.1},
        "training": {"max_grad_norm": 0.5},
    },
    "masters": {
        "model": {"dtype": "bfloat16"},
        "method": {"probes": 2},
        "optimizer": {"weight_decay": 0.1, "master_weights": True},
    },
    "block": {"method": {"name": "mezo_bcd", "probes": 2}, "training": {"max_grad_norm": 0.5}},
    "low_rank_bfloat16": {
        "model": {"dtype": "bfloat16"},
        "method": {"name": "lozo", "directions": {"refresh_every": 3}},
    },
    "subspace_lora": {
        "model": {"adapter": LORA},
        "method": {"name": "subzero", "probes": 2, "directions": {"refresh_every": 3}},
    },
    "lora_modules_in_full_bfloat16": {
        "model": {"adapter": {**LORA, "modules_to_save": ["lm_head"]}, "dtype": "bfloat16"},
        "method": {"difference": "forward"},
    },
    "sparse": {"model": {"freeze": ["*norm*"]}, "method": {"name": "sparse_mezo"}, "optimizer": {"weight_decay": 0.1}},
    "zo_svrg": {"method": {"name": "zo_svrg", "probes": 2, "snapshot": {"every": "3 steps"}}},
    "forward_gradient": {"method": {"name": "forward_gradient"}},
}


SEAL = 41  # bytes


@pytest.mark.parametrize("name", RUNS)
def test_base_and_log_give_the_weights_bit_for_bit(
    name: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """From config.yaml and seedlog.bin alone, in another place, with the base model in another place."""
    workspace.configure(merged(MEZO, RUNS[name]))
    assert workspace.train() == 0
    alone = workspace.root / "alone"
    alone.mkdir()
    for file in ("config.yaml", "seedlog.bin"):
        shutil.copy(workspace.directory() / file, alone)
    (workspace.root / "model").rename("moved")
    capsys.readouterr()
    assert export("alone", "out", "--from-seedlog", "./moved") == 0
    assert "those of the run, bit for bit" in capsys.readouterr().err
    assert equal_weights(workspace.root / "out", workspace.directory() / "model")
    assert not equal_weights(workspace.root / "out", workspace.root / "moved")
    assert (workspace.root / "out" / "README.md").read_text().count("8 steps") == 1


def test_earlier_steps_are_those_of_the_checkpoint(trained: Workspace) -> None:
    for step in (6, 8):
        assert export("runs/tiny", f"out{step}", "--from-seedlog", "model", "--steps", str(step)) == 0
        assert equal_weights(Path(f"out{step}"), trained.directory() / "checkpoints" / f"step-{step:08d}" / "model")
    assert not equal_weights(Path("out6"), Path("out8"))


def test_a_new_classifier_head_is_drawn_again(workspace: Workspace) -> None:
    base = tiny_bert_classifier()
    save_model_folder(workspace.root / "bert", base.bert)
    head = {"model": {"path": "bert", "task": "sequence_classification"}}
    workspace.configure(merged(MEZO, head))
    assert workspace.train() == 0
    assert export("runs/tiny", "out", "--from-seedlog", "bert") == 0
    assert equal_weights(Path("out"), workspace.directory() / "model")


def test_a_wrong_base_model_is_refused(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_folder(Path("other"), tiny_llama(seed=1))
    save_model_folder(Path("tied"), tiny_llama(tied=True))
    for base, reason in (("other", "have other values"), ("tied", "other parameters")):
        assert export("runs/tiny", "out", "--from-seedlog", base) == 2
        error = capsys.readouterr().err
        assert f"error: {base}: is not the base model that runs/tiny/seedlog.bin belongs to: " in error
        assert reason in error
    assert export("runs/tiny", "out", "--from-seedlog", "nowhere") == 2
    assert sorted(path.name for path in trained.root.iterdir() if "out" in path.name) == []


def test_a_wrong_base_of_an_adapter_is_refused(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(merged(MEZO, {"model": {"adapter": LORA}}))
    assert workspace.train() == 0
    save_model_folder(Path("other"), tiny_llama(seed=1))
    capsys.readouterr()
    assert export("runs/tiny", "out", "--from-seedlog", "other") == 2
    assert "what was not trained has other values" in capsys.readouterr().err


def test_a_damaged_log_says_what_is_left(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    log = trained.directory() / "seedlog.bin"
    whole = log.read_bytes()
    for damaged in (whole[:-58], whole[:-58] + b"\x55" + whole[-57:], whole[:-SEAL]):
        log.write_bytes(damaged)
        assert export("runs/tiny", "out", "--from-seedlog", "model") == 2
        error = capsys.readouterr().err
        intact = 8 if damaged == whole[:-SEAL] else 5
        assert f"{intact} steps are intact" in error
        assert f"--steps {intact}" in error
        assert export("runs/tiny", "out", "--from-seedlog", "model", "--steps", "9") == 2
        assert f"has {intact} intact steps" in capsys.readouterr().err
    assert export("runs/tiny", "out", "--from-seedlog", "model", "--steps", "8") == 0
    assert equal_weights(Path("out"), trained.directory() / "model")


def test_a_log_of_another_configuration_is_refused(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("runs/tiny", "out", "--from-seedlog", "model", "--set")
    assert export(*arguments, "run.seed=4") == 2
    assert "another seed than config.yaml" in capsys.readouterr().err
    assert export(*arguments, "optimizer.weight_decay=0.5") == 2
    assert "another weight_decay than" in capsys.readouterr().err
    assert export(*arguments, "method.directions.structure=block") == 2
    assert "another directions than" in capsys.readouterr().err
    assert export(*arguments, "optimizer.momentum=0.5") == 2
    assert "belongs to a run with plain sgd" in capsys.readouterr().err


def test_only_runs_that_the_log_determines_write_one(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    for name, changes in (("adamw", ADAMW), ("momentum", {"optimizer": {"momentum": 0.9}})):
        workspace.configure(merged(merged(MEZO, {"run": {"name": name}}), changes))
        workspace.directory(name).mkdir(parents=True)
        (workspace.directory(name) / "seedlog.bin").write_bytes(b"of an attempt with another method")
        assert workspace.train() == 0
        assert workspace.seed_log(name) is None
    assert export("runs/momentum", "out", "--from-seedlog", "model") == 2
    assert "has no seedlog.bin; zeroth-order runs with plain sgd write one" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from vamo_ft.cli import run
from vamo_ft.training.trainer import Trainer
step = Trainer._step
def killed(self):
    if self.state.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer._step = killed
run(["train", "config.yaml", "--set", "logging.every=1 steps"])
"""


def test_a_killed_run_goes_on_with_its_log(trained: Workspace) -> None:
    trained.configure(merged(MEZO, {"run": {"name": "killed"}}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    log, whole = trained.directory("killed") / "seedlog.bin", trained.seed_log()
    assert whole is not None
    assert log.read_bytes() == whole[: -7 - SEAL]  # seven steps, one more than the checkpoint
    log.write_bytes(log.read_bytes() + b"\x00\x07\x00")  # part of a record
    assert trained.train() == 0
    assert log.read_bytes() == whole


def test_a_log_that_vanished_stops_no_run(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    (trained.directory() / "seedlog.bin").unlink()
    assert trained.train("--set", "training.steps=9") == 0
    assert "without a seed log" in capsys.readouterr().err
    assert trained.seed_log() is None


def test_an_adapter_from_the_log_is_merged_like_the_runs_own(workspace: Workspace) -> None:
    workspace.configure(merged(MEZO, {"model": {"adapter": LORA}}))
    assert workspace.train() == 0
    assert export("runs/tiny", "one", "--merge") == 0
    assert export("runs/tiny", "two", "--merge", "--from-seedlog", "model") == 0
    assert equal_weights(Path("one"), Path("two"))
