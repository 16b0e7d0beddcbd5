import gc

import torch

from vamo_ft.core.allocations import AllocationTrace


def test_memory_that_is_given_up_and_taken_again_is_followed() -> None:
    """As FSDP2 does with its units: no operation tells of it."""
    known, unknown = torch.zeros(100), torch.zeros(50)
    with AllocationTrace([known], label=lambda tensor: "first", resized="again") as trace:
        assert (trace.now, trace.parts) == (400, {"first": 400})
        known.untyped_storage().resize_(0)
        assert (trace.now, trace.peak) == (0, 400)
        known.untyped_storage().resize_(400)
        unknown.untyped_storage().resize_(800)
        assert (trace.now, trace.peak) == (1200, 1200)
        assert trace.parts == {"first": 0, "again": 1200}
        unknown.untyped_storage().resize_(0)
        del known
        gc.collect()
        assert (trace.now, trace.peak) == (0, 1200)
    unknown.untyped_storage().resize_(400)
    assert trace.now == 0


def test_an_error_ends_it() -> None:
    tensor = torch.zeros(100)
    try:
        with AllocationTrace() as trace:
            raise KeyError
    except KeyError:
        tensor.untyped_storage().resize_(800)
    assert trace.now == 0
