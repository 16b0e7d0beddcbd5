"""The device a run uses, as accelerate sees it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from vamo_ft.core.errors import DeviceMemoryError, UsageError
from vamo_ft.core.runtime import LocalRuntime

__all__ = ["build_runtime", "memory_errors_explained"]


def build_runtime(*, autocast: torch.dtype | None) -> LocalRuntime:
    """The runtime of this process: an accelerator where there is one, else the CPU.

    Raises:
        UsageError: started as one of several processes.
    """
    state = PartialState()
    if state.num_processes > 1:
        raise UsageError(
            f"started as one of {state.num_processes} processes, but a run uses one process; start it with "
            "'vamo-ft train' instead of a launcher"
        )
    return LocalRuntime(state.device, autocast=autocast)


@contextmanager
def memory_errors_explained() -> Iterator[None]:
    """Turns an allocation that failed in the block into a `DeviceMemoryError` that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, the CPU's is a plain one
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise DeviceMemoryError(
            f"out of memory: {next(iter(str(error).splitlines()), 'allocation failed')}; lower "
            "training.micro_batch_size, training.forward_batch_tokens or data.max_length, or set "
            "training.activation_checkpointing"
        ) from error
