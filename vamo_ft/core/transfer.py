"""Copies between the host and the device that nobody waits for."""

import torch
from torch import Tensor

__all__ = ["to_device", "to_host"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; what goes from the host to CUDA goes by pinned memory, where a copy runs by itself."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor, *, pinned: bool) -> Tensor:
    """The tensor in host memory, where its values are once the device has come to the copy.

    Args:
        pinned: in memory that copies to and from the device run by themselves in.
    """
    if tensor.device.type == "cpu":
        return tensor.pin_memory() if pinned else tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return host.copy_(tensor, non_blocking=True)
