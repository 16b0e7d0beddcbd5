"""Runs on a pretended CUDA device: nothing mixes memories or reads a copy too early, and results are the CPU's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretended_cuda import CUDA, Memory, pretended_cuda
from tests.test_gpu import RUNS
from tests.test_ledger_counts import CASES
from tests.test_syncs import KEPT_ELSEWHERE
from tests.tiny import save_model_folder, tiny_llama
from tests.workspace import LORA, MEZO, Workspace, equal_weights, merged, weights_in
from vamo_ft.cli import run
from vamo_ft.core.transfer import to_device, to_host

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one: tests/test_gpu.py")

OTHER_HARDWARE = {"compiled", "qlora_paged"}
FOUR_BITS = {"model": {"dtype": "bfloat16", "quantization": {"bits": 4}, "adapter": LORA}}
ALL: dict[str, dict[str, Any]] = {
    **{name: case for name, case in {**CASES, **KEPT_ELSEWHERE, **RUNS}.items() if name not in OTHER_HARDWARE},
    "four_bits": FOUR_BITS,
    "auto": {"training": {"micro_batch_size": "auto"}},
}
QUICK: dict[str, Any] = {
    "model": {"attn_implementation": "eager"},
    "data": {"train": {"limit": 6}, "evaluation": None},
    "evaluation": {"every": None, "metrics": ["loss"]},
    "training": {"steps": 4, "batch_size": 3},
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    with pretended_cuda(monkeypatch) as memory:
        yield memory


@pytest.mark.parametrize("name", ALL)
def test_a_run_and_its_resume_are_those_of_the_cpu(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model_folder(workspace.root / "model", tiny_llama(hidden=64))
    workspace.configure(merged(ALL[name], QUICK))

    def train(name: str) -> dict[str, Tensor]:
        assert workspace.train("--set", f"run.name={name}", "--set", "training.steps=2") == 0
        assert workspace.train("--set", f"run.name={name}") == 0
        return weights_in(workspace.directory(name) / "model")

    expected = train("host")
    with pretended_cuda(monkeypatch) as memory:
        actual = train("device")
    assert memory.launches
    fused = 1e-4 if ALL[name].get("optimizer", {}).get("name", "adamw") == "adamw" else 0.0  # rounds elsewhere
    torch.testing.assert_close(actual, expected, rtol=0, atol=fused)


def test_a_model_is_evaluated_asked_and_exported(
    workspace: Workspace, device: Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(merged(QUICK, {"data": {"evaluation": {"path": "eval.jsonl"}}}))
    assert workspace.train() == 0
    for command in (["evaluate", "runs/tiny"], ["generate", "runs/tiny", "very good It was"]):
        before = device.launches
        assert run(command) == 0
        assert device.launches > before
    assert run(["export", "runs/tiny", "out"]) == 0
    assert equal_weights(workspace.root / "out", workspace.directory() / "model")


def test_a_model_is_made_again_from_its_seed_log(workspace: Workspace, device: Memory) -> None:
    """Coefficients come from a file, to weights that are on the device."""
    workspace.configure(merged(MEZO, QUICK))
    assert workspace.train() == 0
    assert run(["export", "runs/tiny", "again", "--from-seedlog", "model"]) == 0
    assert equal_weights(workspace.root / "again", workspace.directory() / "model")


def test_the_device_is_held_apart_from_the_host(device: Memory) -> None:
    host, there = torch.ones(3), torch.ones(3, device=CUDA)
    assert (host.device.type, there.device, (2 * there).device) == ("cpu", CUDA, CUDA)
    assert (there * torch.tensor(2.0)).device == CUDA  # a number of no dimension goes with anything
    for both in (lambda: host + there, lambda: torch.cat([there, host]), lambda: there[:2].mul_(host[:2])):
        with pytest.raises(RuntimeError, match="same device"):
            both()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert torch.equal(there.cpu(), host)


def test_copies_that_nobody_waits_for_are_not_read_early(device: Memory) -> None:
    there = torch.arange(3.0, device=CUDA)
    host = to_host(there, pinned=True)
    with pytest.raises(RuntimeError, match="before what is copied to it has arrived"):
        host.sum()
    torch.cuda.synchronize()
    assert host.sum() == 3
    back: Tensor = to_device(host, CUDA)
    with pytest.raises(RuntimeError, match="is being copied to the device"):
        host.zero_()
    assert float(back.sum()) == 3  # waits
    host.zero_()
