"""One process on one device, and dropout that needs no generator state."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from vamo_ft.core.hashing import HashKey

__all__ = ["LocalRuntime", "free_memory_bytes", "seeded_generator"]

Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)


class LocalRuntime:
    """The plainest `core.protocols.Runtime`: everything falls to the one process there is."""

    is_main = True

    def __init__(self, device: torch.device | str = "cpu", *, autocast: torch.dtype | None = None) -> None:
        self._device = torch.device(device)
        self._autocast = autocast

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    def alone(self) -> Self:
        """This one."""
        return self

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return torch.autocast(self._device.type, dtype=self._autocast) if self._autocast else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Back-propagates a scalar."""
        loss.backward()  # type: ignore[no-untyped-call]

    @property
    def share(self) -> tuple[int, int]:
        """All of it."""
        return 0, 1

    def place(self, module: nn.Module) -> None:
        """Moves the whole."""
        module.to(self._device)

    def prepared(self, module: Module) -> Module:
        """The module itself."""
        return module

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Nothing to do."""
        return nullcontext()

    def evenly(self, total: int, *, at_most: int) -> int:
        """As large as they may be; the last piece may be smaller."""
        return min(total, at_most)

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """All."""
        return items

    def passes(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """All."""
        return [(item, True) for item in items]

    def rounds(self, items: Iterable[Item]) -> Iterator[tuple[Sequence[Item], Item | None, bool]]:
        """One item after the other."""
        for item in items:
            yield (item,), item, True

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """They are the sums."""

    def largest_(self, tensors: Sequence[Tensor]) -> None:
        """They are the largest."""

    def from_main_(self, tensors: Sequence[Tensor]) -> None:
        """They are the main process's."""

    def agreed(self, value: Any) -> Any:
        """The value."""
        return value

    def any(self, flag: bool) -> bool:
        """The flag."""
        return flag

    def differing(self, values: Callable[[], Tensor]) -> list[int]:
        """None: there is nothing to compare."""
        return []

    def within_step(self, stop_requested: Callable[[], bool]) -> Callable[[], bool]:
        """The same question as between steps."""
        return stop_requested


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
    """Memory that can be had on the CUDA device, or on the host (where the system does not tell, all there is)."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, amount = line.partition(":")
        if name == "MemAvailable":  # what is free, and the file cache that makes room
            return 1024 * int(amount.split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
