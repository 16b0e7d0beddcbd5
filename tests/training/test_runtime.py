"""What launchers hand on in the environment."""

import logging
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from vamo_ft.core.errors import UsageError
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.training import runtime as module
from vamo_ft.training.runtime import build_runtime, connected

SETTINGS = [
    ("USE_FSDP", "true", "FSDP is not read; training.fsdp: true shares the model out"),
    ("MIXED_PRECISION", "bf16", "mixed precision is not read; model.dtype and training.autocast say it"),
    ("DYNAMO_BACKEND", "INDUCTOR", "torch.compile is not read; model.compile: true compiles the layers"),
]


@pytest.fixture(autouse=True)
def nothing_told_yet() -> Iterator[None]:
    module._warn_of_what_is_not_read.cache_clear()
    yield
    module._warn_of_what_is_not_read.cache_clear()


@pytest.mark.parametrize(("name", "value", "said"), SETTINGS)
def test_what_accelerate_is_told_and_a_run_does_not_read_is_warned_of(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with caplog.at_level(logging.WARNING, "vamo_ft"):
        build_runtime(autocast=None)
        build_runtime(autocast=None)  # as after a rollback
    assert caplog.messages == [f"what accelerate is told of {said}"]


@pytest.mark.parametrize("fsdp", [False, True])
def test_what_accelerate_hands_on_by_itself_is_no_reason_to_warn(
    fsdp: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_FSDP": str(fsdp).lower()}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with caplog.at_level(logging.WARNING, "vamo_ft"):
        build_runtime(autocast=None, fsdp=fsdp)
    assert caplog.messages == []


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught, connected():
        pass
    assert str(caught.value) == (
        "accelerate launch is told to use DeepSpeed, which is not supported; start with --multi_gpu, and share a "
        "large model out with training.fsdp: true"
    )


def test_one_process_connects_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a launcher, or a batch system, gave it a number."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with connected() as processes:
        assert processes is None
        assert isinstance(build_runtime(autocast=None), LocalRuntime)
    assert not dist.is_initialized()
