import torch

from vamo_ft.core.types import Batch, Work


def batch(samples: int, *, tokens: int, supervised: int) -> Batch:
    return Batch(tuple(range(samples)), {}, {}, torch.ones(samples), tokens, supervised)


def test_work_of_passes_over_batches() -> None:
    batches = [batch(2, tokens=10, supervised=3), batch(1, tokens=4, supervised=2)]
    assert Work.forward(batches, times=3) == Work(
        forward_samples=9, forward_tokens=42, forward_supervised=15, backward_samples=0
    )
    assert Work.backward(iter(batches)) == Work(backward_samples=3, backward_tokens=14, backward_supervised=5)
    assert Work.forward([]) == Work()


def test_work_adds_up_and_is_restored() -> None:
    total = Work(1, 2, 3, 4, 5, 6, 7) + Work(10, 20, 30, 40, 50, 60, 70)
    assert total == Work(11, 22, 33, 44, 55, 66, 77)
    assert Work.from_state_dict(total.state_dict()) == total
    assert Work.from_state_dict({"forward_samples": 1, "forward_tokens": 2}) == Work(
        forward_samples=1, forward_tokens=2
    )


def test_a_batch_keeps_its_counts_on_another_device() -> None:
    moved = batch(2, tokens=10, supervised=3).to(torch.device("cpu"))
    assert (moved.num_tokens, moved.num_supervised) == (10, 3)
