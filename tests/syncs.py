"""Counts what would make a program wait for a CUDA device, on the CPU.

A device is waited for when its values are asked for on the host, when the shape of a result depends on them, and when
host memory is copied that is not pinned or that the copy may not outlive.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
READING = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default}
COPYING = {Tensor.tolist, Tensor.cpu, Tensor.numpy}

PACKAGE = Path(__file__).resolve().parent.parent / "vamo_ft"
TORCH = Path(torch.__file__).resolve().parent


class SyncCounter:
    """Where the program would wait, as `file:function` of this package, and how often.

    Attributes:
        found: places in the package.
        foreign: places in other libraries; torch.optim counts its steps on the host, and is left out.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.foreign: Counter[str] = Counter()
        self._paused = 0
        self._modes = [_Calls(self), _Operations(self)]

    @contextmanager
    def counting(self) -> Iterator[None]:
        with self._modes[0], self._modes[1]:
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what works on the host alone."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def note(self) -> None:
        if self._paused:
            return
        frame = sys._getframe(2)
        while frame.f_back is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                self.found[f"{path.name}:{frame.f_code.co_name}"] += 1
                return
            if path.is_relative_to(TORCH / "optim"):
                return
            if "site-packages" in path.parts and not path.is_relative_to(TORCH):
                self.foreign[f"{path.name}:{frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back


class _Calls(TorchFunctionMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        blocking = function is Tensor.to and device and not kwargs.get("non_blocking", False)
        created = function in (torch.tensor, torch.as_tensor) and device
        listed = function in (Tensor.__getitem__, Tensor.__setitem__) and _has_list(args[1])
        if function in COPYING or ((blocking or created or listed) and self._is_ours()):
            self._counter.note()
        return function(*args, **kwargs)

    @staticmethod
    def _is_ours() -> bool:
        """Whether this package makes the call; other libraries move tensors to where they are already."""
        return Path(sys._getframe(2).f_code.co_filename).is_relative_to(PACKAGE)


def _has_list(index: Any) -> bool:
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


class _Operations(TorchDispatchMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        by_mask = operation in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if operation in READING or by_mask:
            self._counter.note()
        return operation(*args, **(kwargs or {}))
