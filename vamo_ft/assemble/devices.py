"""Memory of the devices that a run may be planned for."""

import os
from dataclasses import dataclass, replace
from typing import Literal

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
        type: as torch calls it.
    """

    name: str
    memory: int
    type: Literal["cpu", "cuda"]

    def shared_by(self, processes: int) -> "Device":
        """What each of several processes has: a GPU of its own, or its part of one machine's main memory."""
        if self.type == "cuda" or processes == 1:
            return self
        return replace(self, name=f"{self.name} for each of {processes:,}", memory=self.memory // processes)


def find_device(gpu: str | None) -> Device:
    """The GPU of that name, else the CUDA device of this machine, else its main memory.

    Raises:
        UsageError: there is no such name.
    """
    if gpu is not None:
        if gpu.lower() not in GPUS:
            raise UsageError(f"--gpu {gpu}: is not known; choose from {', '.join(GPUS)}")
        return Device(gpu.lower(), GPUS[gpu.lower()] * _GIB - _RESERVED, "cuda")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory - _RESERVED, "cuda")
    return Device("this machine's main memory", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "cpu")
