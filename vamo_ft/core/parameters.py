"""The trainable parameters of a module as one vector of d elements."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from vamo_ft.core.streaming import Change, LayerStream

__all__ = ["Segment", "TrainableParameters", "all_finite", "frozen_digest"]

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

    Args:
        stream: what holds layers of the module on the host; None: all of it is on one device. Values of what it holds
            are there after `settle`, and change by `change` alone.
    """

    def __init__(self, module: nn.Module, *, stream: LayerStream | None = None) -> None:
        named = sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)
        if not named:
            raise ValueError("the module has no parameter that requires a gradient")
        self.names: tuple[str, ...] = tuple(name for name, _ in named)
        self.tensors: tuple[nn.Parameter, ...] = tuple(parameter for _, parameter in named)
        ends = list(accumulate(parameter.numel() for parameter in self.tensors))
        self.offsets: tuple[int, ...] = (0, *ends[:-1])
        self.numel: int = ends[-1]
        self._stream = stream

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
        """The stretches of tensors that make up elements [start, stop) of the vector, in order."""
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

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and values; equal exactly when all of them are."""
        self.settle()
        digest = hashlib.sha256()
        for name, tensor in zip(self.names, self.tensors, strict=True):
            _digest_into(digest, name, tensor, tensor.reshape(-1))
        return digest.hexdigest()


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
