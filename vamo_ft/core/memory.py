"""Allocations that fail: how they are recognised, and what the user is told."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vamo_ft.core.errors import DeviceMemoryError, first_line
from vamo_ft.core.types import Batch

__all__ = ["KEEP_LESS", "is_allocation_failure", "largest_of", "memory_explained"]

KEEP_LESS = (
    "take an optimizer that keeps less (optimizer.name: sgd or adamw_8bit; no optimizer.master_weights), or "
    "train an adapter (model.adapter)"
)
"""What to change where the state of an update rule does not fit."""

_ALLOCATION_FAILED = (
    "out of memory",  # CUDA
    "_status_alloc_failed",  # cuBLAS and cuDNN
    "can't allocate memory",  # torch on the CPU
    "cannot allocate memory",  # the operating system's own word
    "not enough memory",
    "bad_alloc",  # C++
)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether memory has run out; torch.OutOfMemoryError is a RuntimeError, the CPU's is a plain one."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _ALLOCATION_FAILED)
    )


@contextmanager
def memory_explained(phase: str | Callable[[], str], *, remedy: str) -> Iterator[None]:
    """Turns an allocation that fails in the block into a `DeviceMemoryError`; an inner block speaks first.

    Args:
        phase: what the block does, as in "out of memory in ..."; a function is asked when it has failed.
        remedy: what to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_allocation_failure(error):
            raise
        place = phase if isinstance(phase, str) else phase()
        reason = first_line(error, otherwise="an allocation failed")
        raise DeviceMemoryError(
            f"out of memory in {place}: {reason}; {remedy}, and run again: the last checkpoint is used"
        ) from error


def largest_of(batches: Sequence[Batch]) -> str:
    """Samples and longest row, padding included, of the batch that takes most room, in words."""
    sizes = [(rows * width, width, len(batch)) for batch in batches for rows, width in [_shape(batch)]]
    _, width, samples = max(sizes)
    return f"{samples} samples, the longest row of {width} tokens"


def _shape(batch: Batch) -> tuple[int, int]:
    """Rows and tokens of the longest one."""
    shapes = [tuple(tensor.shape) for tensor in batch.inputs.values() if tensor.ndim > 1]
    return max(((shape[0], shape[1]) for shape in shapes), default=(len(batch), 1))
