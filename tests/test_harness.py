"""`vamo-ft evaluate --tasks`, with a stand-in for lm-evaluation-harness that loads what it is told to."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workspace import LORA, PLAIN, Workspace, merged
from vamo_ft.cli import run
from vamo_ft.models.export import quietly

RESULTS = {
    "arc_easy": {
        "alias": "arc_easy",
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "acc_norm,none": 0.125,
        "acc_norm_stderr,none": "N/A",
        "sample_len": 4,
    },
    "gsm8k": {"exact_match,strict-match": 1, "exact_match_stderr,strict-match": 0.0, "alias": " - gsm8k"},
}


class Harness(ModuleType):
    """The part of `lm_eval` that is called."""

    def __init__(self) -> None:
        super().__init__("lm_eval")
        self.__spec__ = ModuleSpec("lm_eval", None)
        self.calls: list[dict[str, Any]] = []
        self.loaded: list[type] = []
        self.error: Exception | None = None

    def simple_evaluate(self, **options: Any) -> dict[str, Any]:
        self.calls.append(options)
        if self.error is not None:
            raise self.error
        arguments = options["model_args"]
        with quietly():
            model = AutoModelForCausalLM.from_pretrained(arguments["pretrained"], dtype=arguments["dtype"])
            if "peft" in arguments:
                model = PeftModel.from_pretrained(model, arguments["peft"])
        AutoTokenizer.from_pretrained(arguments.get("tokenizer", arguments["pretrained"]))
        self.loaded.append(type(model))
        return {"results": RESULTS}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    harness = Harness()
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    return harness


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "adapter"])
def test_tasks_on_a_run(
    adapter: dict[str, Any] | None, workspace: Workspace, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(PLAIN, {"model": {"adapter": adapter, "dtype": "bfloat16"}, "training": {"steps": 1}}))
    assert workspace.train() == 0
    capsys.readouterr()
    assert run(["evaluate", "runs/tiny", "--tasks", "arc_easy, gsm8k", "--limit", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "arc_easy acc                    0.5000 ± 0.2500",
        "arc_easy acc_norm               0.1250",
        "gsm8k exact_match,strict-match  1.0000 ± 0.0000",
    ]
    common = {"dtype": "bfloat16", "trust_remote_code": False}
    folder = "runs/tiny/model"
    whole = {"pretrained": folder, **common}
    adapted = {"pretrained": "model", "revision": "main", "peft": folder, "tokenizer": folder, **common}
    assert harness.calls == [
        {
            "model": "hf",
            "model_args": whole if adapter is None else adapted,
            "tasks": ["arc_easy", "gsm8k"],
            "limit": 3,
            "batch_size": 6,
            "device": "cpu",
        }
    ]
    assert (harness.loaded[0].__name__ == "LlamaForCausalLM") == (adapter is None)


def test_what_the_harness_refuses_is_one_line(
    workspace: Workspace, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(PLAIN, {"training": {"steps": 1}}))
    assert workspace.train() == 0
    harness.error = ValueError("Tasks not found: arc_eazy.\nTry `lm-eval --tasks list`")
    capsys.readouterr()
    for arguments, message in (
        (("--tasks", "arc_eazy"), "error: --tasks: lm-eval: Tasks not found: arc_eazy.\n"),
        (("--tasks", ","), "--tasks: names none"),
        (("--limit", "3"), "--limit: needs --tasks"),
        (("--tasks", "arc_easy", "--data", "eval.jsonl"), "--data: tasks bring their own data"),
    ):
        assert run(["evaluate", "runs/tiny", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_the_harness(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(PLAIN, {"training": {"steps": 1}}))
    assert workspace.train() == 0
    monkeypatch.setattr("vamo_ft.models.harness.importlib.util.find_spec", lambda name: None)
    assert run(["evaluate", "runs/tiny", "--tasks", "arc_easy"]) == 2
    assert "pip install 'vamo-ft[lm-eval]'" in capsys.readouterr().err


def test_predictions_are_not_of_tasks(
    workspace: Workspace, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(PLAIN, {"training": {"steps": 1}}))
    assert workspace.train() == 0
    capsys.readouterr()
    assert run(["evaluate", "runs/tiny", "--tasks", "arc_easy", "--predictions", "out.jsonl"]) == 2
    assert capsys.readouterr().err == "error: --predictions: are of the run's own data; leave it or --tasks out\n"
    assert not harness.calls
