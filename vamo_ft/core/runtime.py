"""One process on one device, and dropout that needs no generator state."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey

__all__ = ["LocalRuntime", "free_memory_bytes", "seeded_generator"]


class LocalRuntime:
    """The plainest `core.protocols.Runtime`."""

    def __init__(self, device: torch.device | str = "cpu", *, autocast: torch.dtype | None = None) -> None:
        self._device = torch.device(device)
        self._autocast = autocast

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return torch.autocast(self._device.type, dtype=self._autocast) if self._autocast else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Back-propagates a scalar."""
        loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def seeded_generator(key: HashKey, device: torch.device) -> Iterator[None]:
    """Within the block torch's default generators start from `key`; afterwards they are as before.

    Dropout draws from them, so its masks are a function of the key alone.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        first, second = key.words
        torch.manual_seed(first << 32 | second)
        yield


def free_memory_bytes(device: torch.device) -> int:
    """Memory that is free on the CUDA device, or on the host (where the system does not tell, all of it)."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
