"""The command line on a tiny model: files, counts, resumes, and what the user is told."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import (
    save_model_folder,
    sentiment_rows,
    tiny_gpt2,
    tiny_llama,
    write_jsonl,
)
from tests.workspace import ADAMW, LORA, VAMO, Workspace
from vamo_ft.cli import run
from vamo_ft.training.trainer import Trainer


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


def test_alpha_zero_equals_first_order_by_weight_hash(workspace: Workspace) -> None:
    workspace.configure({"method": {"name": "first_order"}, **ADAMW})
    assert workspace.train() == 0
    workspace.configure({**VAMO, "method": {**VAMO["method"], "alpha": 0.0}, **ADAMW})
    assert workspace.train("--set", "run.name=zero") == 0
    assert workspace.train("--set", "run.name=one", "--set", "method.alpha=1.0") == 0
    assert workspace.weights() == workspace.weights("zero")
    assert workspace.weights() != workspace.weights("one")


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


def test_half_a_launcher_and_a_folder_that_cannot_be_written_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()
    (workspace.root / "runs").write_text("in the way")
    assert workspace.train() == 2
    assert "run.output_dir" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert workspace.train() == 2
    assert "start them with accelerate launch or torchrun" in capsys.readouterr().err


def test_an_error_that_mentions_memory_is_not_out_of_memory(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()

    def fail(self: Trainer) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Trainer, "_step", fail)
    assert workspace.train() == 1
    assert "illegal memory access" in capsys.readouterr().err
