"""Which memory copies go through; that they arrive is tested on CUDA (tests/test_gpu.py)."""

from typing import Any

import pytest
import torch

from vamo_ft.core.transfer import to_device


class Noting:
    """A tensor of some device that notes what is asked of it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.asked: list[Any] = []

    def pin_memory(self) -> "Noting":
        self.asked.append("pin_memory")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> "Noting":
        self.asked.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("cpu", "cuda", ["pin_memory", ("cuda", True)]),
        ("cuda", "cuda", [("cuda", True)]),
        ("cpu", "cpu", [("cpu", True)]),
    ],
)
def test_what_goes_to_cuda_is_pinned_and_nobody_waits(source: str, target: str, expected: list[Any]) -> None:
    tensor: Any = Noting(source)
    assert to_device(tensor, torch.device(target)) is tensor
    assert tensor.asked == expected
