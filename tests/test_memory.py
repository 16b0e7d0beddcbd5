"""Runs that do not fit into memory: what they say, and micro-batches that fit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from tests.toys import SilentProgress
from tests.workspace import LORA, VAMO, Workspace, merged
from vamo_ft.assemble import parts
from vamo_ft.assemble import run as assembly
from vamo_ft.assemble.micro_batch import largest_that_fits
from vamo_ft.core.errors import DeviceMemoryError
from vamo_ft.core.types import Batch, LossTerms
from vamo_ft.data.order import SampleOrder
from vamo_ft.estimators.svrg import Svrg
from vamo_ft.models import loading
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


def exhaust(*arguments: Any, **keywords: Any) -> None:
    torch.empty(2**60)


# phase: configuration, what allocates, what is said
PHASES: dict[str, tuple[dict[str, Any], Any, str, list[str]]] = {
    "loading": ({}, loading.AutoTokenizer, "from_pretrained", ["in the preparation of the run:"]),
    "step": (
        {"training": {"micro_batch_size": 4}},
        VerbaliserClassification,
        "terms",
        [
            "in a step (its largest micro-batch: 4 samples, the longest row of {step} tokens)",
            "training.micro_batch_size (or write auto)",
        ],
    ),
    "update": ({}, torch.optim.AdamW, "step", ["in the update of a step (batch of 6 samples)", "optimizer.name: sgd"]),
    "snapshot": (
        VAMO,
        VerbaliserClassification,
        "terms",
        [
            "in a snapshot (a batch of 20 samples, the longest row of {all} tokens)",
            "lower training.forward_batch_tokens",
        ],
    ),
    "snapshot_begin": (
        {"method": {"name": "svrg"}},
        Svrg,
        "_begin",
        ["in the work before a step (its snapshot)", "model.adapter"],
    ),
    "evaluation": (
        {},
        VerbaliserClassification,
        "evaluate",
        [
            "in an evaluation (a batch of 9 samples, the longest row of {option} tokens)",
            "lower training.forward_batch_tokens",
        ],
    ),
    "generation": (
        {
            "data": {"format": {"type": "prompt_completion", "prompt": "{sentence}", "completion": "x"}},
            "evaluation": {"every": None, "metrics": ["exact_match"], "max_new_tokens": 7},
        },
        LlamaForCausalLM,
        "generate",
        [
            "in the generation of answers (a batch of 9 prompts of up to {prompt} tokens)",
            "lower max_new_tokens, training.forward_batch_tokens or data.max_length",
        ],
    ),
    "saving": ({"data": {"evaluation": None}}, assembly, "save_model", ["in saving a checkpoint of step 3"]),
}


def token_counts(workspace: Workspace) -> dict[str, int]:
    """Tokens, which are bytes here, of the longest inputs: the last one of a row is only predicted."""
    rows, held_out = (
        [json.loads(line) for line in (workspace.root / name).read_text().splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    )
    lengths = [len(f"{row['sentence']} It was") + len((" bad", " fine")[row["label"]]) - 1 for row in rows]
    step = SampleOrder(20, batch_size=6, seed=3).step_indices(0)[:4]
    return {
        "all": max(lengths),
        "step": max(lengths[index] for index in step),
        "option": max(len(f"{row['sentence']} It was fine") - 1 for row in held_out),
        "prompt": max(len(row["sentence"]) for row in held_out),
    }


@pytest.mark.parametrize("phase", PHASES)
def test_the_phase_its_size_and_the_remedy_are_named(
    phase: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, owner, name, said = PHASES[phase]
    workspace.configure(merged({"evaluation": {"every": None, "metrics": ["loss"]}}, config))
    if phase == "generation":
        text = yaml.safe_load((workspace.root / "config.yaml").read_text())
        text["data"]["format"] = config["data"]["format"]
        (workspace.root / "config.yaml").write_text(yaml.safe_dump(text))
    if phase in ("step", "snapshot"):
        monkeypatch.setattr(parts, "_build_ledger", lambda *_: None)  # it evaluates too, before the first step
    if phase == "step":
        workspace.configure({**config, "data": {"evaluation": None}, "evaluation": {"metrics": ["loss"]}})
    monkeypatch.setattr(owner, name, exhaust)
    assert workspace.train() == 4
    error = capsys.readouterr().err
    sizes = token_counts(workspace)
    for text in said:
        assert text.format(**sizes) in error
    assert "Traceback" not in error
    status = json.loads((workspace.directory() / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("out_of_memory", 4)


LIMITED = """
import resource, sys
from vamo_ft.cli import run
from vamo_ft.training.trainer import Trainer

def limited(self):
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2_000_000, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return step(self)

step, Trainer._step = Trainer._step, limited
sys.exit(run(["train", "config.yaml"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_limit_of_the_operating_system(workspace: Workspace) -> None:
    workspace.configure(
        {"training": {"batch_size": 512}, "data": {"evaluation": None}, "evaluation": {"metrics": ["loss"]}}
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "out of memory in a step (its largest micro-batch: 512 samples, the longest row of " in done.stderr
    assert "Traceback" not in done.stderr


def limit(monkeypatch: pytest.MonkeyPatch, samples: int) -> list[int]:
    """Lets no pass take more samples; returns the sizes that were asked for."""
    original, asked = VerbaliserClassification.terms, list[int]()

    def terms(self: VerbaliserClassification, batch: Batch) -> LossTerms:
        asked.append(len(batch))
        if len(batch) > samples:
            exhaust()
        return original(self, batch)

    monkeypatch.setattr(VerbaliserClassification, "terms", terms)
    return asked


METHODS: dict[str, dict[str, Any]] = {
    "adamw_dropout": {"model": {"adapter": {**LORA, "dropout": 0.2}}},
    "vamo": {**VAMO, "training": {"forward_batch_tokens": 1}},
    "mezo": {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}},
    "forward_gradient": {"method": {"name": "forward_gradient"}, "optimizer": {"learning_rate": 1e-4}},
}


@pytest.mark.parametrize("name", METHODS)
def test_auto_takes_the_largest_that_fits_and_leaves_no_trace(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """6, 3, 2: the run is that of a size of 2 to the last bit and evaluation, and goes on with it where more fits."""
    workspace.configure(METHODS[name])
    assert workspace.train("--set", "run.name=two", "--set", "training.micro_batch_size=2") == 0
    capsys.readouterr()
    auto = ("--set", "training.micro_batch_size=auto")
    with monkeypatch.context() as patch:
        asked = limit(patch, 2)
        assert workspace.train(*auto) == 0
        assert [size for size in dict.fromkeys(asked) if size > 1] == [6, 3, 2]
    assert "training.micro_batch_size: auto takes 2 of 6 samples (the longest has " in capsys.readouterr().err
    assert workspace.weights() == workspace.weights("two")
    assert workspace.metrics() == workspace.metrics("two")

    step, calls = Trainer._step, 0

    def stopping(self: Trainer) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        limit(patch, 2)
        patch.setattr(Trainer, "_step", stopping)
        assert workspace.train(*auto, "--set", "run.name=stopped") == 75
    assert workspace.train(*auto, "--set", "run.name=stopped") == 0
    assert workspace.weights("stopped") == workspace.weights("two")
    assert workspace.metrics("stopped") == workspace.metrics("two")


def test_auto_takes_the_whole_batch_where_it_fits_and_refuses_where_nothing_does(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"training": {"micro_batch_size": "auto", "steps": 2}})
    assert workspace.train() == 0
    assert "auto takes 6 of 6 samples" in capsys.readouterr().err
    monkeypatch.setattr(parts, "_build_ledger", lambda *_: None)
    limit(monkeypatch, 0)
    assert workspace.train("--fresh") == 4
    assert "out of memory in a pass over the longest sample alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "fits", "tried"), [(8, 8, [8]), (8, 5, [8, 4]), (7, 3, [7, 4, 2]), (5, 1, [5, 3, 2, 1])]
)
def test_sizes_are_halved_until_one_fits(size: int, fits: int, tried: list[int]) -> None:
    seen: list[int] = []
    cleared: list[int] = []
    attempt: Callable[[int], None] = lambda size: (seen.append(size), exhaust() if size > fits else None)[1]  # noqa: E731
    assert largest_that_fits(attempt, size, after=lambda: cleared.append(len(seen))) == tried[-1]
    assert seen == tried
    assert cleared == list(range(1, len(tried)))


def test_an_error_of_another_kind_is_not_taken_for_memory() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        largest_that_fits(attempt, 4, after=lambda: None)
    with pytest.raises(DeviceMemoryError, match=r"set training\.activation_checkpointing"):
        largest_that_fits(exhaust, 4, after=lambda: None)


def test_measurements_take_micro_batches_that_fit_too(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from vamo_ft.assemble import build_subject
    from vamo_ft.config.load import load_config

    workspace.configure({**VAMO, "training": {"micro_batch_size": "auto"}})
    limit(monkeypatch, 3)
    config = load_config(workspace.root / "config.yaml", overrides=[]).config
    assert build_subject(config, SilentProgress()).micro_batch_size == 3
