"""Runs whose layers live on the host are the runs that hold them on the device, bit for bit."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedModel

from tests.limited_device import LimitedDevice
from tests.tiny import save_model_folder, tiny_llama
from tests.workspace import LORA, MEZO, Workspace, base_config, equal_weights, merged
from vamo_ft.assemble import evaluator
from vamo_ft.assemble import model as assembled
from vamo_ft.cli import run
from vamo_ft.core import perturbation
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.streaming import LayerStream
from vamo_ft.core.types import Batch, LossTerms
from vamo_ft.models import compilation
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.training.trainer import Trainer

STREAMED = ("--set", "training.stream_layers=true")
WHOLE = ("--set", "run.name=whole")
BASE = merged(
    MEZO,
    {
        "data": {"evaluation": {"path": "eval.jsonl"}},
        "evaluation": {"every": "2 steps", "metrics": ["loss", "accuracy"]},
        "training": {"steps": 6},
    },
)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[LayerStream]:
    """The streams of a test's runs."""
    made: list[LayerStream] = []

    def record(*arguments: Any, **keywords: Any) -> LayerStream:
        made.append(LayerStream(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(assembled, "LayerStream", record)
    return made


def deep_llama(layers: int) -> PreTrainedModel:
    config = tiny_llama().config
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def both_ways(workspace: Workspace, changes: dict[str, Any]) -> None:
    """A run as it is and streamed: metrics, weights and seed log are the same."""
    workspace.configure(merged(BASE, changes))
    assert workspace.train(*WHOLE) == 0
    assert workspace.train(*STREAMED) == 0
    assert any("eval.loss" in line for line in workspace.metrics())
    assert workspace.metrics() == workspace.metrics("whole")
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.seed_log() == workspace.seed_log("whole")


BFLOAT16 = {"model": {"dtype": "bfloat16"}}
RUNS: dict[str, dict[str, Any]] = {
    "rademacher": {"method": {"directions": {"distribution": "rademacher"}}},
    "gaussian_bfloat16": merged(BFLOAT16, {"method": {"probes": 2, "difference": "forward"}}),
    "sphere_clipped": {
        "method": {"directions": {"distribution": "sphere"}},
        "training": {"max_grad_norm": 0.1, "micro_batch_size": 2},
    },
    "decay_bfloat16": merged(BFLOAT16, {"optimizer": {"weight_decay": 0.5}, "training": {"micro_batch_size": "auto"}}),
    "block": {"method": {"name": "mezo_bcd", "directions": {"order": "cyclic"}}, "training": {"micro_batch_size": 4}},
    "block_bfloat16": merged(BFLOAT16, {"method": {"name": "mezo_bcd", "probes": 2}}),
    "lora": {"model": {"adapter": LORA}},
    "lora_block_bfloat16": merged(BFLOAT16, {"model": {"adapter": LORA}, "method": {"name": "mezo_bcd"}}),
    "partly_frozen": {"model": {"freeze": ["*.0.*", "*embed*"]}},
    "autocast": {"training": {"autocast": "bfloat16"}},
    "metric": {"objective": {"type": "metric", "name": "accuracy"}, "method": {"eps": 0.03}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_streamed_run_keeps_every_bit(
    name: str, workspace: Workspace, streams: list[LayerStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturbation, "_ROWWISE_FROM", 1)  # embedding and head row by row, beside the layers
    if name.startswith("block"):
        save_model_folder(workspace.root / "model", deep_llama(4))
    both_ways(workspace, RUNS[name])
    assert len(streams) == 1


@pytest.mark.parametrize("name", ["rademacher", "block"])
def test_it_goes_on_as_if_it_had_not_stopped_streamed_or_not(name: str, workspace: Workspace) -> None:
    """The checkpoint of step 3 is written when a change waits, and read by a run that does not stream, and back."""
    workspace.configure(merged(MEZO, merged(RUNS[name], {"training": {"steps": 6}, "logging": {"every": "1 steps"}})))
    assert workspace.train(*WHOLE) == 0
    assert workspace.train(*STREAMED, "--set", "training.steps=3") == 0
    saved = [workspace.directory(run) / "checkpoints" / "step-00000003" / "model" for run in ("tiny", "whole")]
    assert equal_weights(*saved)
    assert equal_weights(saved[0], workspace.directory() / "model")
    assert workspace.train("--set", "training.steps=4") == 0
    assert workspace.train(*STREAMED) == 0
    assert workspace.metrics() == workspace.metrics("whole")
    assert workspace.weights() == workspace.weights("whole")
    assert workspace.seed_log() == workspace.seed_log("whole")


@pytest.mark.parametrize("name", ["rademacher", "block"])
def test_a_signal_within_a_step_and_an_evaluation_lose_nothing(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure(merged(BASE, merged(RUNS[name], {"training": {"micro_batch_size": 2}})))
    assert workspace.train(*WHOLE) == 0
    terms, calls = VerbaliserClassification.terms, 0

    def interrupted(self: VerbaliserClassification, batch: Batch) -> LossTerms:
        nonlocal calls
        calls += 1
        if calls in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms(self, batch)

    monkeypatch.setattr(VerbaliserClassification, "terms", interrupted)
    stops = {9, 30}
    assert [workspace.train(*STREAMED) for _ in range(3)] == [75, 75, 0]
    assert workspace.metrics() == workspace.metrics("whole")
    assert workspace.weights() == workspace.weights("whole")


def test_weights_too_coarse_for_eps_are_told(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(merged(MEZO, merged(BFLOAT16, {"method": {"eps": 5e-5}, "training": {"steps": 1}})))
    told = []
    for arguments in (WHOLE, STREAMED):
        assert workspace.train(*arguments) == 0
        told.append([line for line in capsys.readouterr().err.splitlines() if "method.eps: 5e-05" in line])
    assert len(told[0]) == 1
    assert told[0] == told[1]


def test_compiled_layers_are_streamed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.compile
    monkeypatch.setattr(compilation, "compiler_available", lambda device: True)
    monkeypatch.setattr(
        compilation.torch, "compile", lambda function, **_: make(function, dynamic=True, backend="eager")
    )
    torch._dynamo.reset()
    both_ways(workspace, {"model": {"compile": True}, "training": {"steps": 2}})
    torch._dynamo.reset()


def test_whatever_reads_a_streamed_run_finds_what_it_trained(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation and export of it, with an adapter that is merged, and its seed log."""
    workspace.configure(merged(BASE, {"model": {"adapter": LORA}, "training": {"steps": 3}}))
    assert workspace.train(*WHOLE) == 0
    assert workspace.train(*STREAMED) == 0
    printed = []
    for name in ("tiny", "whole"):
        capsys.readouterr()
        assert run(["evaluate", f"runs/{name}"]) == 0
        printed.append(capsys.readouterr().out.replace(name, ""))
        assert run(["export", f"runs/{name}", f"{name}-merged", "--merge"]) == 0
        assert run(["export", f"runs/{name}", f"{name}-rebuilt", "--merge", "--from-seedlog", "model"]) == 0
    assert printed[0] == printed[1]
    assert equal_weights(workspace.root / "tiny-merged", workspace.root / "whole-merged")
    assert equal_weights(workspace.root / "tiny-rebuilt", workspace.root / "whole-rebuilt")


def test_a_seed_log_rebuilds_all_weights_layer_by_layer(workspace: Workspace) -> None:
    workspace.configure(merged(MEZO, {"training": {"steps": 20}}))
    assert workspace.train(*STREAMED) == 0
    assert run(["export", "runs/tiny", "rebuilt", "--from-seedlog", "model"]) == 0
    assert equal_weights(workspace.root / "rebuilt", workspace.directory() / "model")


def test_answers_are_generated_from_layer_to_layer(workspace: Workspace) -> None:
    config = merged(base_config(), {**BASE, "evaluation": {"every": "1 steps", "metrics": ["loss", "f1"]}})
    config["data"]["format"] = {"type": "prompt_completion", "prompt": "{sentence}", "completion": " {label}"}
    config["training"]["steps"] = 2
    (workspace.root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    assert workspace.train(*WHOLE, "--set", "evaluation.max_new_tokens=4") == 0
    assert workspace.train(*STREAMED, "--set", "evaluation.max_new_tokens=4") == 0
    assert any("eval.f1" in line for line in workspace.metrics())
    assert workspace.metrics() == workspace.metrics("whole")


class Limit:
    """Puts the steps and evaluations of runs on a device of limited memory."""

    def __init__(self, budget: int, streams: list[LayerStream], patch: pytest.MonkeyPatch) -> None:
        self.devices: list[LimitedDevice] = []
        update, evaluate = Trainer._update, evaluator.evaluate

        def on_device(work: Callable[..., Any]) -> Callable[..., Any]:
            def limited(*arguments: Any, **keywords: Any) -> Any:
                self.devices.append(LimitedDevice(budget, stream=streams[-1] if streams else None))
                with self.devices[-1]:
                    return work(*arguments, **keywords)

            return limited

        patch.setattr(Trainer, "_update", on_device(update))
        patch.setattr(evaluator, "evaluate", on_device(evaluate))


@pytest.mark.parametrize("name", ["rademacher", "block", "lora"])
def test_a_model_larger_than_the_device_is_trained(
    name: str,
    workspace: Workspace,
    streams: list[LayerStream],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under a budget that the layers alone exceed; the run that holds them all is out of memory."""
    model = deep_llama(40)
    save_model_folder(workspace.root / "model", model)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    budget = 28 * layer
    small = {"training": {"steps": 2, "batch_size": 2}, "data": {"evaluation": {"path": "eval.jsonl", "limit": 2}}}
    workspace.configure(merged(BASE, merged(RUNS[name], small)))
    limit = Limit(budget, streams, monkeypatch)
    assert workspace.train(*WHOLE) == 4
    assert f"on a device of {budget}" in capsys.readouterr().err
    monkeypatch.setattr(PreTrainedModel, "to", None)  # the whole model is moved nowhere
    limit.devices.clear()
    assert workspace.train(*STREAMED) == 0
    assert max(device.peak for device in limit.devices) <= budget
    assert sum(slot.memory.nbytes for slot in streams[-1]._slots) < 2.1 * layer


def test_a_step_reads_host_memory_for_each_pass_and_writes_it_once(
    workspace: Workspace, streams: list[LayerStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of a step is made in the first pass of the next one, or of the evaluation between them."""
    save_model_folder(workspace.root / "model", deep_llama(4))
    workspace.configure(merged(MEZO, {"training": {"steps": 4}, "checkpoint": {"every": None}}))
    limit = Limit(10**9, streams, monkeypatch)
    assert workspace.train(*STREAMED) == 0
    assert [device.write_backs for device in limit.devices] == [0, 4, 4, 4]
    assert [device.uploads for device in limit.devices] == [9, 8, 8, 8]  # a step leaves its successor's first layer


@pytest.mark.parametrize("changes", [{}, {"training": {"stream_layers": True}}], ids=["whole", "streamed"])
def test_a_device_too_small_for_the_model_is_told_with_what_to_take(
    changes: dict[str, Any], workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    monkeypatch.setattr(LocalRuntime, "place", full)
    monkeypatch.setattr(assembled, "LayerStream", full)
    workspace.configure(merged(MEZO, changes))
    assert workspace.train() == 4
    assert (
        "out of memory in bringing the model to the device: CUDA out of memory. Tried to allocate 4 GiB; take "
        "model.dtype: bfloat16, model.quantization with an adapter, training.stream_layers with method.name: mezo, or "
        "training.fsdp on several devices, and run again"
    ) in capsys.readouterr().err
