"""The device a run uses, as accelerate sees it."""

import os
from contextlib import AbstractContextManager

import torch
from accelerate import PartialState

from vamo_ft.core.errors import UsageError
from vamo_ft.core.memory import memory_explained
from vamo_ft.core.runtime import LocalRuntime

__all__ = ["build_runtime", "memory_errors_explained", "refuse_launchers"]


def refuse_launchers() -> None:
    """A run uses one process.

    Raises:
        UsageError: a launcher started this one among several; told before any of them waits for another.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UsageError(
            f"started as one of {processes} processes, but a run uses one; start it with 'vamo-ft train' instead of a "
            "launcher"
        )


def build_runtime(*, autocast: torch.dtype | None) -> LocalRuntime:
    """The runtime of this process: on CUDA where it is there, else on the CPU (MPS lacks the float64 of the sums)."""
    refuse_launchers()
    device = PartialState().device
    return LocalRuntime(device if device.type == "cuda" else "cpu", autocast=autocast)


def memory_errors_explained(phase: str) -> AbstractContextManager[None]:
    """`memory_explained` for all that no block within knows better; `phase` as in "out of memory in ..."."""
    return memory_explained(
        phase,
        remedy="lower training.micro_batch_size or training.forward_batch_tokens, or take model.dtype: bfloat16 or an "
        "adapter (model.adapter)",
    )
