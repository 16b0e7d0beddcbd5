"""The trainable parameters of a module as one vector of d elements."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

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
    """

    def __init__(self, module: nn.Module) -> None:
        named = sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)
        if not named:
            raise ValueError("the module has no parameter that requires a gradient")
        self.names: tuple[str, ...] = tuple(name for name, _ in named)
        self.tensors: tuple[nn.Parameter, ...] = tuple(parameter for _, parameter in named)
        ends = list(accumulate(parameter.numel() for parameter in self.tensors))
        self.offsets: tuple[int, ...] = (0, *ends[:-1])
        self.numel: int = ends[-1]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.tensors[0].device

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
    """Whether no element is NaN or infinite; waits for the device."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())
