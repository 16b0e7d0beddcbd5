"""A machine without a device that behaves as if host and device had memories of their own."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vamo_ft.core import offload


class TwoMemories:
    """What is kept on the host is lent as a copy, and its bytes are counted for as long as the copy lives.

    Attributes:
        lent: bytes on the device now.
        most: the most so far.
        largest: of one tensor.
        kept: bytes on the host now.
        moved: bytes from one to the other, but for those that are put back.
    """

    def __init__(self) -> None:
        self.lent = self.most = self.largest = self.kept = self.moved = 0
        self._host: set[int] = set()

    def to_host(self, tensor: Tensor, *, pinned: bool) -> Tensor:
        kept = tensor.clone()
        place = kept.untyped_storage()._cdata
        self._host.add(place)
        self.kept += kept.nbytes
        self.moved += kept.nbytes
        weakref.finalize(kept.untyped_storage(), self._dropped, place, kept.nbytes).atexit = False
        return kept

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.untyped_storage()._cdata not in self._host:
            return tensor
        copy = tensor.clone()
        self.lent += copy.nbytes
        self.moved += copy.nbytes
        self.most, self.largest = max(self.most, self.lent), max(self.largest, copy.nbytes)
        weakref.finalize(copy.untyped_storage(), self._returned, copy.nbytes).atexit = False
        return copy

    def _dropped(self, place: int, size: int) -> None:
        self._host.discard(place)
        self.kept -= size

    def _returned(self, size: int) -> None:
        self.lent -= size


@contextmanager
def two_memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMemories]:
    memories = TwoMemories()
    with monkeypatch.context() as patch:
        patch.setattr(offload, "to_host", memories.to_host)
        patch.setattr(offload, "to_device", memories.to_device)
        yield memories
