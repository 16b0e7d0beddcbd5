"""The device a run uses, as accelerate sees it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from vamo_ft.core.errors import DeviceMemoryError, UsageError
from vamo_ft.core.runtime import LocalRuntime

__all__ = ["build_runtime", "memory_errors_explained", "refuse_launchers"]

_ALLOCATION_FAILED = ("out of memory", "can't allocate memory", "not enough memory")


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


@contextmanager
def memory_errors_explained() -> Iterator[None]:
    """Turns an allocation that failed in the block into a `DeviceMemoryError` that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, the CPU's is a plain one
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _ALLOCATION_FAILED):
            raise
        raise DeviceMemoryError(
            f"out of memory: {next(iter(str(error).splitlines()), 'allocation failed')}; lower "
            "training.micro_batch_size or training.forward_batch_tokens, or set training.activation_checkpointing, and "
            "run again: the last checkpoint is used"
        ) from error
