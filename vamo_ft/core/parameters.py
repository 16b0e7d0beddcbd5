"""The trainable parameters of a module as one vector of d elements."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from vamo_ft.core.protocols import Runtime
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.sharding import Part, own_part
from vamo_ft.core.streaming import Change, LayerStream

__all__ = ["Segment", "TrainableParameters", "all_finite", "frozen_digest", "num_weights"]

_SAMPLED = 256  # values of each frozen tensor that its digest looks at


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one parameter: elements [start, stop) of tensor `index`, which begin at `offset` in the vector."""

    index: int
    start: int
    stop: int
    offset: int


class TrainableParameters:
    """The parameters that require a gradient, sorted by name, tied ones once.

    An element's offset is its position in the concatenation of the tensors in that order; it keys the element's random
    bits and is the same whatever the device, precision or sharding.

    Of a module that is shared out over processes (`core.sharding`) each holds some rows of every tensor. `tensors` are
    these rows, at their place in the vector; `numel` counts the whole.

    Args:
        runtime: the processes that the module is shared out over; None: it is not.
        stream: what holds layers of the module on the host; None: all of it is on one device. Values of what it holds
            are there after `settle`, and change by `change` alone.

    Attributes:
        names: of the tensors.
        registered: the parameters as the module has them.
        tensors: what this process holds and trains: the same, or some rows of each.
        offsets: of the first element of each of them.
        extents: offsets [start, stop) of each whole tensor.
        numel: d, the length of the vector.
        sharded: whether other processes hold other rows.
    """

    def __init__(self, module: nn.Module, runtime: Runtime | None = None, *, stream: LayerStream | None = None) -> None:
        named = sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)
        if not named:
            raise ValueError("the module has no parameter that requires a gradient")
        self.names: tuple[str, ...] = tuple(name for name, _ in named)
        ends = list(accumulate(parameter.numel() for _, parameter in named))
        self.extents: tuple[tuple[int, int], ...] = tuple(zip([0, *ends[:-1]], ends, strict=True))
        self.numel: int = ends[-1]
        self.registered: tuple[nn.Parameter, ...] = tuple(parameter for _, parameter in named)
        parts = [own_part(parameter) for parameter in self.registered]
        self.tensors: tuple[nn.Parameter, ...] = tuple(tensor for tensor, _ in parts)
        self._rows = tuple(rows for _, rows in parts)
        self.offsets: tuple[int, ...] = tuple(
            start + (0 if rows is None else rows.start * ((stop - start) // rows.count))
            for (start, stop), rows in zip(self.extents, self._rows, strict=True)
        )
        self.sharded = any(rows is not None for rows in self._rows)
        self._runtime = LocalRuntime() if runtime is None else runtime
        self._stream = stream

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return sum(count * size for count, size in self.sizes(whole=True))

    @property
    def num_held(self) -> int:
        """Elements that this process holds."""
        return sum(tensor.numel() for tensor in self.tensors)

    def sizes(self, *, whole: bool) -> list[tuple[int, int]]:
        """Elements of each tensor, and bytes of one: of the whole tensor, or of what this process holds of it."""
        held = [tensor.numel() for tensor in self.tensors]
        counts = [stop - start for start, stop in self.extents] if whole else held
        return [(count, tensor.element_size()) for count, tensor in zip(counts, self.tensors, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the parameters are, when they are computed with."""
        return self.tensors[0].device if self._stream is None else self._stream.device

    def streamed(self, indices: Sequence[int]) -> dict[int, nn.Parameter]:
        """Those of the parameters `indices` that are on the host while their layer does not run."""
        if self._stream is None:
            return {}
        return {index: self.tensors[index] for index in indices if self._stream.holds(self.tensors[index])}

    def displaced(self, indices: Sequence[int], change: Change) -> AbstractContextManager[None]:
        """Within the block the streamed parameters `indices` are changed while their layer runs, and not kept so."""
        tensors = self.streamed(indices)
        return nullcontext() if self._stream is None or not tensors else self._stream.displaced(tensors, change)

    def change(self, indices: Sequence[int], change: Change) -> None:
        """Changes the parameters `indices`, in place: streamed ones when they are needed, the others now."""
        streamed = self.streamed(indices)
        if here := [index for index in indices if index not in streamed]:
            change([self.tensors[index] for index in here], here)
        if self._stream is not None and streamed:
            self._stream.change(streamed, change)

    def settle(self) -> None:
        """Makes the changes that wait; belongs before values are read other than by a forward pass of the module."""
        if self._stream is not None:
            self._stream.settle()

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """The stretches of tensors that make up elements [start, stop) of the vector, in order, where held."""
        for index, (offset, tensor) in enumerate(zip(self.offsets, self.tensors, strict=True)):
            low, high = max(start, offset), min(stop, offset + tensor.numel())
            if low < high:
                yield Segment(index, low - offset, high - offset, low)

    def gradients(self, indices: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The `.grad` of each tensor, or of those at `indices`; a missing one is made, filled with zeros."""
        tensors = self.tensors if indices is None else [self.tensors[index] for index in indices]
        for tensor in tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return tuple(tensor.grad for tensor in tensors if tensor.grad is not None)

    def clear_gradients(self) -> None:
        """Drops every `.grad`."""
        for tensor in self.tensors:
            tensor.grad = None

    def copy(self) -> tuple[Tensor, ...]:
        """A copy of the values."""
        return tuple(tensor.detach().clone() for tensor in self.tensors)

    @torch.no_grad()
    def assign(self, values: Sequence[Tensor]) -> None:
        """Writes `values` into the parameters, bit for bit."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def total(self, value: Tensor) -> Tensor:
        """A sum over this process's elements -> that over all of them, to the same bits; collective where sharded."""
        if self.sharded:
            value = value.clone()
            self._runtime.sum_([value])
        return value

    def agree_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces what processes computed from equal numbers by the main one's bits; collective where sharded."""
        if self.sharded:
            self._runtime.from_main_(tensors)

    def all_finite(self) -> bool:
        """Whether no element is NaN or infinite; waits for the device, and collective where sharded."""
        return not self._runtime.any(not all_finite(self.tensors)) if self.sharded else all_finite(self.tensors)

    def saved(self, index: int, tensor: Tensor, *, leading: int = 0) -> "Tensor | Part":
        """A tensor like parameter `index`, after `leading` more dimensions, as it stands in a state tree."""
        rows = self._rows[index]
        return tensor if rows is None else Part(tensor, leading, rows.count)

    def own(self, index: int, tensor: Tensor, *, leading: int = 0) -> Tensor:
        """What this process holds of a tensor from a state tree: the tensor, which may be no more than that already."""
        rows = self._rows[index]
        if rows is None or tensor.ndim <= leading or tensor.shape[leading] != rows.count:
            return tensor
        return tensor.narrow(leading, rows.start, rows.stop - rows.start)

    def saved_all(self, tensors: Sequence[Tensor], *, leading: int = 0) -> "list[Tensor | Part]":
        """One tensor like each parameter, as they stand in a state tree."""
        return [self.saved(index, tensor, leading=leading) for index, tensor in enumerate(tensors)]

    def own_all(self, tensors: Sequence[Tensor], *, leading: int = 0) -> list[Tensor]:
        """What this process holds of them."""
        return [self.own(index, tensor, leading=leading) for index, tensor in enumerate(tensors)]

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and values; equal exactly when all of them are."""
        self.settle()
        digest = hashlib.sha256()
        for name, tensor in zip(self.names, self.tensors, strict=True):
            _digest_into(digest, name, tensor, tensor.reshape(-1))
        return digest.hexdigest()


def num_weights(parameter: Tensor) -> int:
    """Elements of the tensor that a parameter stands for; one in 4 bits holds two of them in a byte."""
    quantised = getattr(parameter, "quant_state", None)  # bitsandbytes'
    return parameter.numel() if quantised is None else int(quantised.shape.numel())


def frozen_digest(module: nn.Module) -> str:
    """SHA-256 over what of a module is not trained: names, types, shapes, and up to 256 values of each tensor.

    The values stand at equal distances. Another model, or another fine-tuning of the same one, differs in nearly every
    value, so that these tell it apart without reading the whole; a change of single values may pass. Buffers that are
    not saved, such as tables of positions, are left out: a forward pass may change them.
    """
    digest, saved = hashlib.sha256(), module.state_dict().keys()
    tensors: list[tuple[str, Tensor]]
    tensors = [(name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad]
    tensors += [(name, buffer) for name, buffer in module.named_buffers() if name in saved]
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        flat = tensor.reshape(-1)
        _digest_into(digest, name, tensor, flat[:: max(1, -(-len(flat) // _SAMPLED))])
    return digest.hexdigest()


def _digest_into(digest: "hashlib._Hash", name: str, tensor: Tensor, values: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite, wherever the tensors are; waits for the device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(verdicts).all()) for verdicts in by_device.values())
