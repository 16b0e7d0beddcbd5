"""A device of limited memory, simulated on the CPU."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vamo_ft.core.streaming import LayerStream

ATEN = torch.ops.aten
VIEWS = {ATEN.detach.default, ATEN.slice.Tensor, ATEN.view.default, ATEN.view.dtype, ATEN.alias.default}


class LimitedDevice(TorchDispatchMode):
    """Within the block the memory that operations work on belongs to a device of `budget` bytes.

    A stream's host memory does not, and nothing but a copy may touch it: what computes with it would have failed on a
    real device.

    Args:
        held: what is on the device before an operation works on it; what of that the stream holds is not.

    Attributes:
        peak: bytes on the device at most.
        uploads: layers that were copied to it.
        write_backs: layers that were copied from it.
    """

    def __init__(self, budget: int, *, stream: LayerStream | None, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._budget = budget
        layers = [] if stream is None else stream._layers
        self._host = {layer.memory.untyped_storage()._cdata for layer in layers}
        self._host |= {values.untyped_storage()._cdata for layer in layers for values in layer.values}
        self._live: dict[int, int] = {}
        self.peak = self.uploads = self.write_backs = 0
        for tensor in (*held, *(() if stream is None else [slot.memory for slot in stream._slots])):
            if tensor.untyped_storage()._cdata not in self._host:
                self._hold(tensor)

    def __torch_dispatch__(
        self, operation: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [each for each in tree_iter((args, kwargs, result)) if isinstance(each, Tensor)]
        on_host = [each.untyped_storage()._cdata in self._host for each in tensors]
        if any(on_host) and operation is ATEN.copy_.default:
            self.uploads += not on_host[0]
            self.write_backs += on_host[0]
        else:
            assert not any(on_host) or operation in VIEWS, f"{operation} on the host's memory"
        for tensor, host in zip(tensors, on_host, strict=True):
            if not host:
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (place := storage._cdata) in self._live:
            return
        self._live[place] = storage.nbytes()
        weakref.finalize(storage, self._live.pop, place).atexit = False
        self.peak = max(self.peak, held := sum(self._live.values()))
        if held > self._budget:
            raise torch.OutOfMemoryError(f"out of memory: {held} bytes on a device of {self._budget}")
