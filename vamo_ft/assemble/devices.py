"""Memory of the devices that a run may be planned for."""

import os
from dataclasses import dataclass

import torch

from vamo_ft.core.errors import UsageError

__all__ = ["GPUS", "Device", "find_device"]

_GIB = 2**30
_RESERVED = _GIB  # of a GPU: the driver's context, the libraries' workspaces, and pieces of the wrong size

GPUS = {
    "t4": 16,
    "v100-16gb": 16,
    "v100-32gb": 32,
    "a10g": 24,
    "l4": 24,
    "l40s": 48,
    "a6000": 48,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "h100-80gb": 80,
    "h200": 141,
    "b200": 180,
    "rtx3060": 12,
    "rtx3090": 24,
    "rtx4070": 12,
    "rtx4080": 16,
    "rtx4090": 24,
    "rtx5090": 32,
}
"""Name -> memory in GiB, as its maker states it."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run is to fit.

    Attributes:
        memory: bytes that a run can have.
        on_host: whether that is the host's own.
    """

    name: str
    memory: int
    on_host: bool = False


def find_device(gpu: str | None) -> Device:
    """The GPU of that name, else the CUDA device of this machine, else its main memory.

    Raises:
        UsageError: there is no such name.
    """
    if gpu is not None:
        if gpu.lower() not in GPUS:
            raise UsageError(f"--gpu {gpu}: is not known; choose from {', '.join(GPUS)}")
        return Device(gpu.lower(), GPUS[gpu.lower()] * _GIB - _RESERVED)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory - _RESERVED)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("this machine's main memory", memory, on_host=True)
