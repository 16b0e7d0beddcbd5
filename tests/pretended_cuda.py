"""A CUDA device that is pretended on the CPU: programs believe in it, and are held to what a real one demands.

Tensors are the CPU's; which of them are on the device is kept beside, by their memory. On the device is what was put
there or computed from what is there. An operation on both memories fails, as do an answer of the host that is read
before the copy that brings it has been waited for, and a change of host memory that a copy may still be reading.
What only the hardware shows (kernels, speed, the order of streams) stays unseen.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ATEN = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MEMORY = 8 << 30

COPIES = {ATEN.copy_.default, ATEN._to_copy.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default}
"""Places on the device may be named from the host."""
WAITING = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default, ATEN.masked_select.default}


class Memory:
    """What is where.

    Attributes:
        launches: operations on the device.
    """

    def __init__(self) -> None:
        self._device: set[int] = set()
        self._pinned: set[int] = set()
        self._coming: dict[int, Tensor] = {}
        self._leaving: set[int] = set()
        self.launches = 0

    def on_device(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._device

    def pinned(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._pinned

    def coming(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._coming

    def leaving(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._leaving

    def put(self, tensor: Tensor) -> Tensor:
        return self._keep(self._device, tensor)

    def take_back(self, tensor: Tensor) -> Tensor:
        self._device.discard(_place(tensor))
        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        return self._keep(self._pinned, tensor)

    def copied(self, target: Tensor, source: Tensor) -> None:
        """A copy that nobody waits for is under way."""
        if self.on_device(target) and not self.on_device(source) and self.pinned(source):
            self._keep(self._leaving, source)
        if self.on_device(source) and not self.on_device(target) and self.pinned(target):
            self._coming[_place(target)] = target

    def wait(self) -> None:
        """All that was asked for is done."""
        self._coming.clear()
        self._leaving.clear()

    def _keep(self, places: set[int], tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) not in places:
            places.add(place)
            weakref.finalize(tensor.untyped_storage(), places.discard, place).atexit = False
        return tensor


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Operations(TorchDispatchMode):
    """Every operation works on one memory; what it makes is there."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(
        self, operation: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, memory = kwargs or {}, self._memory
        if operation in WAITING and any(memory.on_device(each) for each in tree_iter(args) if isinstance(each, Tensor)):
            memory.wait()
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        device = [each for each in given if memory.on_device(each)]
        host = [each for each in given if not memory.on_device(each)]
        if operation not in COPIES and operation.namespace == "aten":
            self._check(operation, args, device, host)
        result = operation(*args, **kwargs)
        if operation is ATEN.copy_.default:
            memory.copied(args[0], args[1])
            if not memory.on_device(args[0]) and (not memory.pinned(args[0]) or not _asynchronous(args, kwargs)):
                memory.wait()
        elif device and operation is not ATEN._local_scalar_dense.default:
            memory.launches += 1
            for each in tree_iter(result):
                if isinstance(each, Tensor):
                    memory.put(each)
        return result

    def _check(self, operation: Any, args: Sequence[Any], device: list[Tensor], host: list[Tensor]) -> None:
        arrays = [each for each in host if each.dim()]
        if operation in INDEXED:
            arrays = [] if self._memory.on_device(args[0]) else [*device, *arrays]
            if device and arrays:
                raise RuntimeError(f"{operation}: places in host memory are named from the device")
        if device and arrays:
            raise RuntimeError(
                f"{operation}: Expected all tensors to be on the same device, but found {tuple(arrays[0].shape)} on "
                f"the host and {tuple(device[0].shape)} on the device"
            )
        if operation.is_view or operation in (ATEN.detach.default, ATEN.alias.default, ATEN.view.default):
            return
        if any(self._memory.coming(each) for each in host):
            raise RuntimeError(f"{operation} reads host memory before what is copied to it has arrived")
        if operation._schema.is_mutable and isinstance(args[0], Tensor) and self._memory.leaving(args[0]):
            raise RuntimeError(f"{operation} changes host memory that is being copied to the device")


def _asynchronous(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


class _Calls(TorchFunctionMode):
    """Devices are named in calls and attributes of Python; the CPU behind them knows nothing of this one."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory
        self._own = {
            Tensor.device.__get__: self._device,
            Tensor.is_cuda.__get__: lambda tensor: memory.on_device(tensor),
            Tensor.is_cpu.__get__: lambda tensor: not memory.on_device(tensor),
            Tensor.get_device: lambda tensor: 0 if memory.on_device(tensor) else -1,
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor, **_: self._to(tensor, CPU),
            Tensor.cuda: lambda tensor, *_, **options: self._to(tensor, CUDA, **options),
            Tensor.pin_memory: self._pin,
            Tensor.is_pinned: lambda tensor, *_: memory.pinned(tensor),
            Tensor.numpy: self._numpy,
        }

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if (own := self._own.get(function)) is not None:
            return own(*args, **kwargs)
        if function is torch.device and _named(args[0]) is CUDA:
            return CUDA
        pinned = kwargs.pop("pin_memory", False)
        if (asked := kwargs.get("device")) is None:
            result = function(*args, **kwargs)
            return self._memory.pin(result) if pinned else result
        asked = torch.device(_named(asked))
        result = function(*args, **{**kwargs, "device": CPU if asked.type == "cuda" else asked})
        if not isinstance(result, Tensor):
            return result
        if asked.type == "cuda" and not self._memory.on_device(result):
            return self._memory.put(result.clone())
        return self._memory.take_back(result) if asked.type == "cpu" else result

    def _device(self, tensor: Tensor) -> torch.device:
        return CUDA if self._memory.on_device(tensor) else Tensor.device.__get__(tensor)

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (self._device(args[0]), args[0].dtype, *args[1:])
        args = tuple(map(_named, args))
        kwargs = {name: _named(value) for name, value in kwargs.items()}
        asked, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options = {"dtype": dtype or tensor.dtype, "memory_format": memory_format or torch.preserve_format}
        there = self._memory.on_device(tensor)
        if asked is not None and asked.type not in ("cpu", "cuda"):
            return tensor.to(asked, **options)
        if asked is None or (asked.type == "cuda") == there:
            return tensor.to(copy=copy, **options)
        moved = tensor.to(copy=True, **options)
        if there:
            self._memory.wait()
            return self._memory.take_back(moved)
        if non_blocking:
            self._memory.copied(self._memory.put(moved), tensor)
        return self._memory.put(moved)

    def _pin(self, tensor: Tensor, *_: Any) -> Tensor:
        if self._memory.on_device(tensor):
            raise RuntimeError("cannot pin memory of the device: only dense CPU tensors can be pinned")
        return tensor if self._memory.pinned(tensor) else self._memory.pin(tensor.clone())

    def _numpy(self, tensor: Tensor, **options: Any) -> Any:
        if self._memory.on_device(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if self._memory.coming(tensor):
            raise RuntimeError("numpy reads host memory before what is copied to it has arrived")
        return tensor.numpy(**options)


def _named(value: Any) -> Any:
    """A number stands for a device that is no CPU."""
    return CUDA if isinstance(value, int) and not isinstance(value, bool) else value


class _Stream:
    """Of a device that does one thing after another."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def synchronize(self) -> None:
        self._memory.wait()

    def wait_stream(self, stream: "_Stream") -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> "_Stream":
        return self


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Within the block this thread has a CUDA device."""
    memory = Memory()
    stream = _Stream(memory)
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0, cudaError=SimpleNamespace(success=0)
    )
    state = torch.get_rng_state
    told: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: memory.wait(),
        "get_device_name": lambda device=None: "pretended",
        "get_device_properties": lambda device=None: SimpleNamespace(name="pretended", total_memory=MEMORY),
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: stream,
        "Stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "cudart": lambda: cudart,
        "get_rng_state": lambda device=None: state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    with monkeypatch.context() as patch:
        for name, value in told.items():
            patch.setattr(torch.cuda, name, value)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads know nothing of the device
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        with _Calls(memory), _Operations(memory):
            yield memory
