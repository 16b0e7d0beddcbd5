import errno

import pytest
import torch

from tests.toys import ToySource, normal
from vamo_ft.core.errors import DataError, DeviceMemoryError
from vamo_ft.core.memory import is_allocation_failure, largest_of, memory_explained
from vamo_ft.core.types import Batch

FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
    DataError("the file says: out of memory"),
]


@pytest.mark.parametrize("error", FAILURES, ids=str)
def test_an_allocation_that_failed_is_told_in_one_line(error: Exception) -> None:
    assert is_allocation_failure(error)
    with pytest.raises(DeviceMemoryError) as caught, memory_explained("a dream", remedy="wake up"):
        raise error
    text = str(caught.value)
    assert text.startswith("out of memory in a dream: ")
    assert text.endswith("; wake up, and run again: the last checkpoint is used")
    assert "\n" not in text
    assert (str(error).splitlines() or ["an allocation failed"])[0] in text


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_explained("a dream", remedy="wake up"):
        raise error
    assert caught.value is error


def test_torch_itself_fails_in_a_form_that_is_known() -> None:
    with pytest.raises(DeviceMemoryError), memory_explained("a dream", remedy="wake up"):
        torch.empty(2**60)


def test_the_inner_block_speaks_and_the_place_is_asked_for_after_the_failure() -> None:
    place = ["before"]

    def fail() -> None:
        with memory_explained(lambda: place[0], remedy="y"):
            place[0] = "after"
            raise MemoryError

    with pytest.raises(DeviceMemoryError, match=r"^out of memory in after: "), memory_explained("outside", remedy="x"):
        fail()


def test_the_largest_batch_is_the_one_of_most_tokens() -> None:
    def batch(samples: int, *shape: int) -> Batch:
        ids = torch.zeros(*shape, dtype=torch.long)
        return Batch(tuple(range(samples)), {"input_ids": ids, "extra": torch.zeros(3)}, {}, torch.ones(samples), 1)

    batches = [batch(4, 4, 10), batch(1, 3, 20), batch(5, 5, 11)]
    assert largest_of(batches) == "1 samples, the longest row of 20 tokens"
    assert largest_of([ToySource(normal(3, 2, seed=0), batch_size=3).batch([0, 1])]).startswith("2 samples, the")
