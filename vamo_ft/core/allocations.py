"""What a computation on outlines of tensors would allocate.

An outline is a tensor with shape, type and device, and no memory (torch's fake tensors). A computation on outlines runs
the same operations in the same order as one on values, so that what it allocates and frees can be followed exactly.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["AllocationTrace", "CopiedOutlines", "outlines"]

_QUESTIONS = ("aten::_local_scalar_dense", "aten::equal")  # about the values that outlines do not have
_UNWRITTEN = "aten::empty"  # has no values either, and stands where outlines do


def outlines() -> FakeTensorMode:
    """Within the block tensors are outlines; later operations on them and on real tensors give outlines too."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class CopiedOutlines(TorchFunctionMode):
    """Within the block `copy.deepcopy` gives an outline for an outline; else it reads values that are not there."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        """Takes the place of one function."""
        if function is not Tensor.__deepcopy__ or not isinstance(arguments[0], FakeTensor):
            return function(*arguments, **(keywords or {}))
        tensor, memo = arguments
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = copied
        return copied


class AllocationTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block follows the memory of all tensors that operations return, each storage once.

    Of a tensor that stands for others, such as one that is shared out over processes (`core.sharding`), those that are
    here count. Whatever asks for the value of an outline is answered with 1 or yes: the checks of a healthy run pass.
    Memory that an operation takes and gives back inside itself is not seen.

    Args:
        existing: tensors that exist already.
        label: names the part of memory that a new tensor belongs to.
        resized: names that of storages that are given memory again, as FSDP2 does with those that it puts units
            together in.

    Attributes:
        now: bytes held.
        peak: the largest `now` so far.
        parts: label -> bytes, at the peak.
    """

    def __init__(
        self,
        existing: Iterable[Tensor] = (),
        *,
        label: Callable[[Tensor], str] = lambda tensor: "other",
        resized: str = "other",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._label = label
        self._resized = resized
        self._resizes = ExitStack()
        self._live: dict[int, tuple[str, int]] = {}
        self._by_label: Counter[str] = Counter()
        self.now = self.peak = 0
        self.parts: Mapping[str, int] = {}
        self._mode: FakeTensorMode | None = None
        for tensor in existing:
            for inner in _inner(tensor):
                self._mode = inner.fake_mode if isinstance(inner, FakeTensor) else self._mode
            self._hold(tensor)
        self.restart()

    def restart(self) -> None:
        """Begins the peak anew at what is held now."""
        self.peak, self.parts = self.now, dict(self._by_label)

    def __enter__(self) -> Self:
        self._resizes.enter_context(_resizes_told(self._resize))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        self._resizes.close()

    def __torch_dispatch__(
        self, operation: Any, types: Sequence[type], arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        """Runs one operation and holds what it returns."""
        if operation._schema.name in _QUESTIONS and isinstance(arguments[0], FakeTensor):
            return True if arguments[0].dtype == torch.bool or operation._schema.name == _QUESTIONS[1] else 1
        with self._mode if self._mode is not None and operation._schema.name == _UNWRITTEN else nullcontext():
            result = operation(*arguments, **(keywords or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        for inner in _inner(tensor):
            storage = inner.untyped_storage()
            if storage._cdata not in self._live:
                self._add(storage, self._label(inner))

    def _add(self, storage: torch.UntypedStorage, label: str) -> None:
        size = storage.nbytes()
        self._live[storage._cdata] = label, size
        self._change(label, size)
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _resize(self, storage: torch.UntypedStorage) -> None:
        label, size = self._live.get(storage._cdata, (self._resized, None))
        if size is None:
            self._add(storage, label)
            return
        self._live[storage._cdata] = self._resized, storage.nbytes()
        self._change(label, -size)
        self._change(self._resized, storage.nbytes())

    def _free(self, place: int) -> None:
        label, size = self._live.pop(place)
        self._change(label, -size)

    def _change(self, label: str, size: int) -> None:
        self._by_label[label] += size
        self.now += size
        if self.now > self.peak:
            self.restart()


def _inner(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory that a tensor stands for: itself, or those that it wraps."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for part in (getattr(tensor, name) for name in flatten()[0]):
        if isinstance(part, Tensor):
            yield from _inner(part)


@contextmanager
def _resizes_told(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Within the block every storage whose size changes is told; no operation of torch's says so."""
    resize = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resized: torch.UntypedStorage = resize(storage, size)
        tell(storage)
        return resized

    torch.UntypedStorage.resize_ = told  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
