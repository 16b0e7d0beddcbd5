"""Runs that stop, crash or are continued: the same weights and metrics as the uninterrupted run."""

import json
import os
import shutil
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import (
    save_model_folder,
    sentiment_rows,
    tiny_bert_classifier,
    write_jsonl,
)
from tests.workspace import ADAMW, LORA, VAMO, Workspace, interrupt_at, merged
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.svrg import Svrg
from vamo_ft.estimators.table import DerivativeTable
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.training.checkpoint import _digest
from vamo_ft.training.rundir import RunDirectory
from vamo_ft.training.trainer import Trainer

MIXTURE = {"train": [{"path": "train.jsonl", "weight": 1}, {"path": "eval.jsonl", "weight": 2, "limit": 8}]}

METHODS: dict[str, dict[str, Any]] = {
    "adamw_accumulation": {"training": {"micro_batch_size": 4}},
    "adamw_lora_dropout": {"model": {"adapter": {**LORA, "dropout": 0.2}}},
    "sgd_momentum": {
        "method": {"name": "sgd"},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True},
        "schedule": {"name": "cosine", "warmup_steps": 2},
    },
    "vamo": VAMO,
    "vamo_auto_eps_adamw": {**VAMO, **ADAMW, "method": {**VAMO["method"], "eps": "auto", "difference": "forward"}},
    "vamo_informed": {
        "model": {"adapter": LORA},
        **ADAMW,
        "method": {
            **VAMO["method"],
            "eps": "auto",
            "directions": {"structure": "gradient_subspace", "warmup_steps": 3},
        },
    },
    "vamo_adaptive_refresh": {
        **VAMO,
        "method": {
            **VAMO["method"],
            "snapshot": {"every": "1 steps", "refresh": "adaptive", "min_correlation": 0.99, "budget": 3.0},
        },
        "training": {"steps": 20},
    },
    "vamo_mixture": {**VAMO, "data": MIXTURE},
    "svrg_mixture": {"method": {"name": "svrg", "snapshot": {"every": "4 steps"}}, "data": MIXTURE},
    "vamo_recompute": {**VAMO, "method": {**VAMO["method"], "source": "recompute", "snapshot": {"every": "1 epoch"}}},
    "vamo_literal": {
        "model": {"adapter": LORA},
        "training": {"batch_size": 3},
        "method": {"name": "vamo_literal", "probes": 2, "radius": 0.1, "alpha": 0.01, "snapshot": {"every": "4 steps"}},
        "optimizer": {"learning_rate": 0.1},
    },
    "addax_accumulation": {
        "method": {"name": "addax", "boundary": 28, "weight": 0.01, "probes": 2},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.9},
        "training": {"micro_batch_size": 2},
    },
    "forward_gradient": {"method": {"name": "forward_gradient", "probes": 2}, "optimizer": {"learning_rate": 1e-4}},
    "forward_gradient_lora_adamw": {
        "model": {"adapter": LORA},
        "method": {"name": "forward_gradient", "directions": {"distribution": "gaussian"}},
        **ADAMW,
    },
    "mezo": {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}},
    "mezo_bfloat16": {
        "model": {"dtype": "bfloat16"},
        "method": {"name": "mezo", "directions": {"distribution": "sphere"}},
        "optimizer": {"learning_rate": 1e-4},
    },
    "mezo_masters": {
        "model": {"dtype": "bfloat16"},
        "method": {"name": "mezo"},
        "optimizer": {"learning_rate": 1e-4, "master_weights": True},
    },
    "adamw_masters": {
        "model": {"dtype": "bfloat16"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "master_weights": True},
    },
    "svrg_offloaded": {"method": {"name": "svrg", "snapshot": {"every": "4 steps", "offload": True}}},
    "mezo_bcd": {"method": {"name": "mezo_bcd"}, "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1}},
    "mezo_bcd_adamw": {"method": {"name": "mezo_bcd", "directions": {"order": "flip_flop"}}, **ADAMW},
    "lozo": {"method": {"name": "lozo", "directions": {"refresh_every": 3}}, "optimizer": {"learning_rate": 1e-4}},
    "subzero_lora": {
        "model": {"adapter": LORA},
        "method": {"name": "subzero", "probes": 2, "directions": {"refresh_every": 3}},
        "optimizer": {"learning_rate": 1e-3},
    },
    "sparse_mezo": {
        "model": {"freeze": ["*norm*"]},
        "method": {"name": "sparse_mezo"},
        "optimizer": {"learning_rate": 1e-2},
    },
    "zo_adam": {"method": {"name": "zo_adam"}, "optimizer": {"learning_rate": 1e-3}},
    "zo_sign": {"method": {"name": "zo_sign"}, "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1}},
    "zo_momentum": {"method": {"name": "zo_momentum"}, "optimizer": {"learning_rate": 1e-5}},
    "svrg_lora_dropout": {
        "model": {"adapter": {**LORA, "dropout": 0.2}},
        "method": {"name": "svrg", "snapshot": {"every": "4 steps"}},
    },
    "svrg_bfloat16_adamw": {"model": {"dtype": "bfloat16"}, "method": {"name": "svrg", "alpha_decay": "none"}, **ADAMW},
    "zo_svrg": {"method": {"name": "zo_svrg", "difference": "forward"}, "optimizer": {"learning_rate": 1e-4}},
    "mezo_svrg": {"method": {"name": "mezo_svrg"}, "optimizer": {"learning_rate": 1e-5}},
}

PASSES: dict[str, tuple[type, str]] = {
    "vamo": (DerivativeTable, "add"),
    "vamo_literal": (LossProbe, "own_derivatives"),
    "svrg": (Svrg, "_add_gradient"),
    "zo_svrg": (LossProbe, "own_derivatives"),
    "mezo_svrg": (LossProbe, "own_derivatives"),
}
"""Method -> what is called once for each group of samples in a snapshot."""


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in a step, in an evaluation and, where there are any, in the snapshots."""
    config = METHODS[name]
    workspace.configure(config)
    assert workspace.train("--set", "run.name=whole") == 0
    stops = [(Trainer, "_step", 4), (VerbaliserClassification, "evaluate", 1), (Trainer, "_step", 1)]
    if (in_pass := PASSES.get(config.get("method", {}).get("name", ""))) is not None:
        stops += [(*in_pass, 1), (*in_pass, 2)]
    for owner, method, call in stops:
        with monkeypatch.context() as patch:
            interrupt_at(patch, owner, method, call)
            assert workspace.train("--set", "training.forward_batch_tokens=300") == 75
        within = in_pass == (owner, method) and call == 1
        assert ("stopped in a snapshot" if within else "stopped") in capsys.readouterr().err
        assert json.loads((workspace.directory() / "status.json").read_text())["exit_code"] == 75
    assert workspace.train("--set", "training.forward_batch_tokens=300") == 0
    workspace.configure(config)
    assert workspace.train("--set", "run.name=whole", "--fresh", "--set", "training.forward_batch_tokens=300") == 0
    assert workspace.weights() == workspace.weights("whole-2")
    assert workspace.metrics() == workspace.metrics("whole-2")
    assert workspace.seed_log() == workspace.seed_log("whole-2")


def test_a_crash_loses_only_the_work_since_the_checkpoint(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure(VAMO)
    assert workspace.train("--set", "run.name=whole") == 0
    with monkeypatch.context() as patch:

        def crash(self: Trainer) -> None:
            if self.state.step == 5:
                raise ZeroDivisionError
            return step(self)

        step = Trainer._step
        patch.setattr(Trainer, "_step", crash)
        assert workspace.train() == 1
    assert json.loads((workspace.directory() / "status.json").read_text())["state"] == "failed"
    assert workspace.metrics()[-1]["step"] == 4
    assert workspace.train() == 0
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")
    assert '"step": 4' in (workspace.directory() / "metrics.discarded.jsonl").read_text()


def test_training_longer_goes_on_and_other_changes_are_refused(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"training": {"steps": 4}})
    assert workspace.train() == 0
    assert workspace.train("--set", "training.steps=6") == 0
    assert [line["step"] for line in workspace.metrics() if "loss" in line] == [2, 4, 6]
    assert workspace.train("--set", "run.name=whole", "--set", "training.steps=6") == 0
    assert workspace.weights() == workspace.weights("whole")
    capsys.readouterr()
    assert workspace.train("--set", "training.steps=8", "--set", "training.batch_size=5") == 2
    error = capsys.readouterr().err
    assert "training.batch_size: 6 -> 5" in error
    assert "--fresh" in error
    assert workspace.train("--resume", "never", "--set", "training.steps=9") == 2
    write_jsonl(workspace.root / "train.jsonl", sentiment_rows(21))
    assert workspace.train("--set", "training.steps=8") == 2
    assert "the samples differ" in capsys.readouterr().err
    assert workspace.train("--fresh") == 0
    assert workspace.directory("tiny-2").is_dir()


def test_a_classifier_head_trains_and_resumes(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model_folder(workspace.root / "bert", tiny_bert_classifier())
    workspace.configure({"model": {"path": "bert", "task": "sequence_classification"}})
    assert workspace.train("--set", "run.name=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, Trainer, "_step", 5)
        assert workspace.train() == 75
    assert workspace.train() == 0
    assert workspace.weights() == workspace.weights("whole")
    evaluations = [line["eval.loss"] for line in workspace.metrics() if "eval.loss" in line]
    assert evaluations[-1] < evaluations[0]


def test_an_earlier_checkpoint_gives_the_later_ones_up(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(VAMO)
    assert workspace.train("--set", "run.name=whole") == 0
    assert workspace.train("--set", "checkpoint.keep=9") == 0
    earlier = str(workspace.directory() / "checkpoints" / "step-00000003")
    with monkeypatch.context() as patch:

        def crash(self: Trainer) -> None:
            raise ZeroDivisionError

        patch.setattr(Trainer, "_step", crash)
        assert workspace.train("--resume", earlier) == 1
    assert workspace.train("--set", "training.micro_batch_size=6") == 0
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.metrics() == workspace.metrics("whole")
    kept = sorted(path.name for path in (workspace.directory() / "checkpoints").iterdir())
    first = str(workspace.directory() / "checkpoints" / kept[0])
    assert workspace.train("--resume", first, "--set", "training.batch_size=5") == 2
    assert sorted(path.name for path in (workspace.directory() / "checkpoints").iterdir()) == kept
    capsys.readouterr()
    assert workspace.train("--set", "run.name=whole", "--set", "training.steps=9", "--resume", earlier) == 2
    assert "not a checkpoint of this run" in capsys.readouterr().err


def test_evaluation_may_change_when_a_run_goes_on(workspace: Workspace) -> None:
    workspace.configure({"training": {"steps": 4}, "data": {"evaluation": None}, "evaluation": {"metrics": ["loss"]}})
    assert workspace.train() == 0
    workspace.configure({"training": {"steps": 5}})
    assert workspace.train() == 0
    assert workspace.train("--set", "evaluation.metrics=[loss]", "--set", "training.steps=6") == 0
    lines = [line for line in workspace.metrics() if "eval.loss" in line]
    assert [(line["step"], "eval.accuracy" in line) for line in lines] == [(4, True), (5, True), (6, False)]


def test_a_shorter_length_than_the_checkpoint_is_refused(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"schedule": {"name": "linear"}})
    assert workspace.train() == 0
    assert workspace.train("--set", "training.steps=4") == 2
    assert "past the 4 steps" in capsys.readouterr().err
    assert workspace.train("--set", "training.steps=9") == 0
    assert "was planned for 8 steps" in capsys.readouterr().err


def test_a_finished_run_without_its_model_writes_it_again(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"training": {"steps": 2}})
    assert workspace.train() == 0
    weights, lines = workspace.weights(), workspace.metrics()
    shutil.rmtree(workspace.directory() / "model")
    assert workspace.train() == 0
    assert "this run is finished" not in capsys.readouterr().out
    assert (workspace.weights(), workspace.metrics()) == (weights, lines)


def test_a_run_is_finished_when_its_model_is_on_the_disk(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of it and its name are synced before status.json says so: after a loss of power it is whole."""
    synced, fsync, status = set[Path](), os.fsync, RunDirectory.write_status

    def noted(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").resolve())
        fsync(descriptor)

    def checked(self: RunDirectory, state: str, **facts: Any) -> None:
        if state == "finished":
            aside = self.root.resolve() / ".model.tmp"
            names = {path.name for path in self.model.iterdir()}
            assert {path.name for path in synced if path.parent == aside} == names != set()
            assert {aside, self.root.resolve()} <= synced
        status(self, state, **facts)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(RunDirectory, "write_status", checked)
    workspace.configure({"training": {"steps": 2}})
    assert workspace.train() == 0


@pytest.mark.parametrize("owner", ["run", "update_rule", "estimator", "metrics"])
def test_a_state_of_another_version_is_one_line(
    owner: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are whole, and say something else than this version expects."""
    workspace.configure(merged(VAMO, {"method": {"alpha": "adaptive"}, "optimizer": {"name": "adamw"}}))
    assert workspace.train() == 0
    checkpoint = workspace.directory() / "checkpoints" / "step-00000008"
    path = checkpoint / "state" / f"{owner}.json"
    path.write_text(json.dumps({"unknown": {"deeper": 1}}))
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest.pop("sha256")
    entry = {"size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
    manifest["files"][f"state/{owner}.json"] = entry
    (checkpoint / "MANIFEST.json").write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    capsys.readouterr()
    assert workspace.train("--set", "training.steps=9") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: runs/tiny/checkpoints/step-00000008: its state is not one that this version reads ("
    )
    assert "it was written by vamo-ft 0.1.0: go on with that, or start anew with --fresh" in error


def test_a_fresh_run_keeps_its_name(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure({"training": {"steps": 2}})
    assert workspace.train() == 0
    assert workspace.train("--fresh") == 0
    assert "name: tiny-2" in (workspace.directory("tiny-2") / "config.yaml").read_text()
    capsys.readouterr()
    assert workspace.train("--set", "run.name=tiny-2") == 0
    assert "this run is finished" in capsys.readouterr().out


def test_a_stop_at_a_boundary_that_is_saved_writes_no_second_checkpoint(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vamo_ft.assemble import run

    saved: list[int] = []
    original = run.save_checkpoint

    def save(root: Path, **options: Any) -> Path:
        saved.append(options["step"])
        if options["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(root, **options)

    monkeypatch.setattr(run, "save_checkpoint", save)
    workspace.configure()
    assert workspace.train() == 75
    assert saved == [3]
    assert workspace.train() == 0
    assert saved == [3, 6, 8]


def test_checkpoints_that_are_all_damaged_are_not_trained_over(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()
    assert workspace.train() == 0
    lines = workspace.metrics()
    for weights in (workspace.directory() / "checkpoints").glob("*/model/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    assert workspace.train("--set", "training.steps=9") == 2
    assert "no checkpoint is intact" in capsys.readouterr().err
    assert workspace.metrics() == lines
