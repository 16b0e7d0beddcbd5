"""The command line on a tiny model: files, counts, resumes, and what the user is told."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import (
    save_model_folder,
    sentiment_rows,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    write_jsonl,
)
from tests.workspace import LORA, Workspace
from vamo_ft.cli import run
from vamo_ft.estimators.table import DerivativeTable
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.training.trainer import Trainer

VAMO = {"method": {"name": "vamo", "probes": 2, "eps": 0.001, "snapshot": {"every": "4 steps"}}}
ADAMW = {"optimizer": {"name": "adamw", "learning_rate": 0.01}}
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
    "vamo_recompute": {**VAMO, "method": {**VAMO["method"], "source": "recompute", "snapshot": {"every": "1 epoch"}}},
    "mezo": {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}},
    "mezo_bfloat16": {
        "model": {"dtype": "bfloat16"},
        "method": {"name": "mezo", "directions": {"distribution": "sphere"}},
        "optimizer": {"learning_rate": 1e-4},
    },
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """Sends this process a SIGTERM at the given call of a method."""
    original, calls = getattr(owner, name), 0

    def wrapper(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(owner, name, wrapper)


def test_a_run_leaves_exactly_its_files_and_counts(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(VAMO)
    assert workspace.train() == 0
    directory = workspace.directory()
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert {file for file in files if "/" not in file} == {
        ".lock",
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.jsonl",
        "status.json",
    }
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/README.md"} <= files
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"

    lines = workspace.metrics()
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "eval.loss" in line] == [0, 4, 8]
    assert all(0 <= line["eval.accuracy"] <= 1 and line["eval.samples"] == 9 for line in lines if "eval.loss" in line)
    last = [line for line in lines if "loss" in line][-1]
    assert {"epoch", "learning_rate", "grad_norm", "tokens", "samples", "flops", "method.alpha"} <= last.keys()
    assert last["samples"] == 48
    assert last["epoch"] == 48 / 20
    assert last["backward_evals"] == 48
    assert last["forward_evals"] == 48 + 2 * (4 * 20)  # two snapshots, 2 probes with central differences

    output = capsys.readouterr().out
    assert "before" in output
    assert "vamo-ft evaluate runs/tiny" in output
    assert workspace.train() == 0
    assert "this run is finished" in capsys.readouterr().out
    assert workspace.metrics() == lines


def test_learning_happens_and_the_model_loads_without_us(workspace: Workspace) -> None:
    workspace.configure({**VAMO, **ADAMW, "training": {"steps": 30}})
    assert workspace.train() == 0
    evaluations = [line for line in workspace.metrics() if "eval.loss" in line]
    assert evaluations[-1]["eval.loss"] < 0.3 * evaluations[0]["eval.loss"]
    assert evaluations[-1]["eval.accuracy"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(workspace.directory() / "model")
    tokenizer = AutoTokenizer.from_pretrained(workspace.directory() / "model")
    prompt = tokenizer("very good It was", return_tensors="pt")
    prompt.pop("token_type_ids", None)
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " fine"


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in a step, in an evaluation and, with VAMO, in the snapshots."""
    config = METHODS[name]
    workspace.configure(config)
    assert workspace.train("--set", "run.name=whole") == 0
    stops = [(Trainer, "_step", 4), (VerbaliserClassification, "evaluate", 1), (Trainer, "_step", 1)]
    if "vamo" in name:
        stops += [(DerivativeTable, "add", 1), (DerivativeTable, "add", 2)]
    for owner, method, call in stops:
        with monkeypatch.context() as patch:
            interrupt_at(patch, owner, method, call)
            assert workspace.train("--set", "training.forward_batch_tokens=300") == 75
        assert "stopped" in capsys.readouterr().err
        assert json.loads((workspace.directory() / "status.json").read_text())["exit_code"] == 75
    assert workspace.train("--set", "training.forward_batch_tokens=300") == 0
    workspace.configure(config)
    assert workspace.train("--set", "run.name=whole", "--fresh", "--set", "training.forward_batch_tokens=300") == 0
    assert workspace.weights() == workspace.weights("whole-2")
    assert workspace.metrics() == workspace.metrics("whole-2")


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


def test_alpha_zero_equals_first_order_by_weight_hash(workspace: Workspace) -> None:
    workspace.configure({"method": {"name": "first_order"}, **ADAMW})
    assert workspace.train() == 0
    workspace.configure({**VAMO, "method": {**VAMO["method"], "alpha": 0.0}, **ADAMW})
    assert workspace.train("--set", "run.name=zero") == 0
    assert workspace.train("--set", "run.name=one", "--set", "method.alpha=1.0") == 0
    assert workspace.weights() == workspace.weights("zero")
    assert workspace.weights() != workspace.weights("one")


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


def test_evaluate_repeats_the_last_evaluation(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure({"model": {"adapter": LORA}})
    assert workspace.train() == 0
    last = workspace.metrics()[-1]
    capsys.readouterr()
    for target in ("runs/tiny", "runs/tiny/checkpoints/step-00000008"):
        assert run(["evaluate", target]) == 0
        output = capsys.readouterr().out.split()
        assert output == [
            "samples",
            "9",
            "loss",
            f"{last['eval.loss']:.4f}",
            "accuracy",
            f"{last['eval.accuracy']:.4f}",
        ]
    write_jsonl(workspace.root / "other.jsonl", sentiment_rows(4))
    assert run(["evaluate", "runs/tiny", "--data", "other.jsonl"]) == 0
    assert "samples   4" in capsys.readouterr().out
    assert run(["evaluate", "model"]) == 2
    assert "neither a run directory nor a checkpoint" in capsys.readouterr().err


def test_divergence_stops_before_the_update(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(
        {
            "training": {"steps": 8, "max_grad_norm": None},
            "method": {"name": "sgd"},
            "optimizer": {"learning_rate": 1e30},
        }
    )
    assert workspace.train("--set", "evaluation.every=null") == 3
    assert "the update was not made" in capsys.readouterr().err
    assert json.loads((workspace.directory() / "status.json").read_text())["state"] == "diverged"


def test_running_out_of_memory_has_its_own_exit_code(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()

    def allocate(self: Trainer) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(Trainer, "_step", allocate)
    assert workspace.train() == 4
    assert "training.micro_batch_size" in capsys.readouterr().err


def test_another_process_in_the_directory_is_refused(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from vamo_ft.training.rundir import RunDirectory

    workspace.configure()
    directory = RunDirectory(workspace.directory())
    directory.lock()
    assert workspace.train() == 2
    assert "in use by process" in capsys.readouterr().err
    directory.unlock()


BY_HAND = """
run: {name: tiny, output_dir: runs}
model: {path: model}
data:
DATA
method: {name: adamw}
optimizer: {learning_rate: 1e-2}
training: {epochs: 6, batch_size: 5}
evaluation: {metrics: METRICS}
"""
DATA = {
    "mail.csv": """
  train: {path: mail.csv}
  evaluation: {path: mail.csv, limit: 5}
  format:
    type: classification
    template: "Mail: {body}\\nKind:"
    label: kind
    labels: {spam: " junk", ham: " post", "no": " nothing"}
""",
    "pairs.json": """
  train: {path: pairs.json}
  evaluation: {path: pairs.json}
  format: {type: prompt_completion, prompt: "Q: {question}\\nA:", completion: " {answer}"}
""",
}


@pytest.mark.parametrize("file", DATA)
def test_data_nobody_has_seen(file: str, workspace: Workspace) -> None:
    mail = [
        f'{kind},"{body}, {index}"' for index in range(6) for body, kind in [("win now", "spam"), ("at noon", "ham")]
    ]
    (workspace.root / "mail.csv").write_text("\n".join(["kind,body", *mail, 'no,"nothing, 0"']) + "\n")
    pairs = [{"question": f"{a}+{b}?", "answer": a + b} for a in range(4) for b in range(3)]
    (workspace.root / "pairs.json").write_text(json.dumps(pairs))
    metrics = "[loss]" if file == "pairs.json" else "[loss, accuracy]"
    text = BY_HAND.replace("DATA", DATA[file]).replace("METRICS", metrics)
    (workspace.root / "config.yaml").write_text(text)
    assert workspace.train() == 0
    evaluations = [line for line in workspace.metrics() if "eval.loss" in line]
    assert evaluations[-1]["eval.loss"] < evaluations[0]["eval.loss"]
    assert ("eval.accuracy" in evaluations[0]) == (file == "mail.csv")


@pytest.mark.parametrize("adapter", [None, LORA])
def test_gpt2_with_learnt_positions_trains(adapter: Any, workspace: Workspace) -> None:
    save_model_folder(workspace.root / "gpt2", tiny_gpt2())
    adapter = None if adapter is None else {**adapter, "target_modules": "all-linear"}
    workspace.configure({"model": {"path": "gpt2", "adapter": adapter}, **VAMO, **ADAMW})
    assert workspace.train() == 0
    evaluations = [line["eval.loss"] for line in workspace.metrics() if "eval.loss" in line]
    assert evaluations[-1] < evaluations[0]


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


def test_tied_embeddings_and_frozen_parameters(workspace: Workspace) -> None:
    save_model_folder(workspace.root / "tied", tiny_llama(tied=True))
    workspace.configure({"model": {"path": "tied", "freeze": ["*layers.0.*"]}, "training": {"steps": 2}})
    assert workspace.train() == 0
    before = dict(tiny_llama(tied=True).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(workspace.directory() / "model").named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.embed_tokens.weight" in changed
    assert not any("layers.0." in name for name in changed)


def test_options_that_change_memory_but_not_the_result(workspace: Workspace) -> None:
    workspace.configure()
    assert workspace.train() == 0
    assert workspace.train("--set", "run.name=recomputed", "--set", "training.activation_checkpointing=true") == 0
    losses = [[line["loss"] for line in workspace.metrics(name) if "loss" in line] for name in ("tiny", "recomputed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert workspace.train("--set", "run.name=low", "--set", "training.autocast=bfloat16") == 0


def test_bad_data_is_one_clear_line(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure()
    rows = [*sentiment_rows(3), {"sentence": "odd", "label": 7}]
    write_jsonl(workspace.root / "train.jsonl", rows)
    assert workspace.train() == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "row 4" in error[0]
    assert "7" in error[0]
