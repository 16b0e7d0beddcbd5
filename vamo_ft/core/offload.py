"""Tensors that are kept in host memory and lent to the device one at a time."""

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.transfer import to_device, to_host

__all__ = ["Shelf", "shelved", "shelved_zeros"]


class Shelf(Sequence[Tensor]):
    """A list of tensors on the device, or in host memory and lent to it.

    To read a tensor is to borrow it. With `offload` that is a copy on the device, which is there for as long as it is
    held, and which has to be put back (`shelf[i] = tensor`) where it was changed; without, it is the tensor itself.
    Copies go both ways through pinned memory on the device's current stream: in order with the work before and after
    them, and nobody waits. On the CPU the two are one memory, and nothing is copied.

    Args:
        tensors: are taken over one by one: what makes them need not have two on the device.
        device: where they are lent to.
        offload: keep them in host memory.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), *, device: torch.device, offload: bool) -> None:
        self._device = device
        self._offload = offload
        self._kept = [self._stored(tensor) for tensor in tensors]

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """A tensor on the device."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return to_device(self._kept[index], self._device)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        """Puts a tensor in the place of another one of its shape and type."""
        if self._offload and tensor is not self._kept[index]:
            self._kept[index].copy_(tensor, non_blocking=True)
        else:
            self._kept[index] = tensor

    def write(self, index: int, row: int, values: Tensor) -> None:
        """Replaces one row of a tensor, without borrowing the others."""
        self._kept[index][row].copy_(values, non_blocking=True)

    def part(self, indices: Iterable[int]) -> "Shelf":
        """Some of the tensors, which stay where they are."""
        shelf = self.like(())
        shelf._kept = [self._kept[index] for index in indices]
        return shelf

    def like(self, tensors: Iterable[Tensor]) -> "Shelf":
        """Other tensors, kept in the same way."""
        return Shelf(tensors, device=self._device, offload=self._offload)

    def state(self) -> list[Tensor]:
        """The tensors where they are kept, for a checkpoint; waits until all that was put there has arrived."""
        if self._offload and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return list(self._kept)

    def _stored(self, tensor: Tensor) -> Tensor:
        if self._offload:
            return to_host(tensor, pinned=self._device.type == "cuda")
        return to_device(tensor, self._device)


def shelved(parameters: TrainableParameters, *, offload: bool) -> Shelf:
    """A copy of the parameters' values."""
    copies = (tensor.detach().clone() for tensor in parameters.tensors)
    return Shelf(copies, device=parameters.device, offload=offload)


def shelved_zeros(parameters: TrainableParameters) -> Shelf:
    """Zeros of the parameters' shapes on the device, float32 or wider, to add up in."""
    zeros = (torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters.tensors)
    return Shelf(zeros, device=parameters.device, offload=False)
