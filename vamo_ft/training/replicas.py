"""Whether all processes of a run have read the same files, and hold the same parameters."""

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vamo_ft.core.errors import DataError, DriftError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Runtime
from vamo_ft.core.transfer import to_device
from vamo_ft.training.callbacks import Callback
from vamo_ft.training.state import RunState

__all__ = ["ReplicaCheck", "bit_sums", "check_alike"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_alike(runtime: Runtime, read: Mapping[str, Any]) -> None:
    """Compares what was read of the files, which machines may have on disks of their own; collective.

    Other samples, or another frozen base, would leave the trained parameters alike, and wrong.

    Args:
        read: key of the configuration -> fingerprint (JSON) of what it names; None: there is nothing here to compare.

    Raises:
        DataError: this process has read something else than the main one.
    """
    main = runtime.agreed(dict(read))
    different = [key for key, own in read.items() if None not in (own, main[key]) and own != main[key]]
    if different:
        raise DataError(
            f"{' and '.join(different)}: on {socket.gethostname()} the files are not those that the first process has "
            "read; give all machines of the run the same"
        )


class ReplicaCheck(Callback):
    """Compares the parameters of all processes, by the sums of their bit patterns.

    A step that is not the same everywhere, as by a defect of a device, would otherwise train something that no single
    process holds. A drift that began is never undone.

    Args:
        due: whether they are compared after so many steps. What is about to be saved is, whenever that is.
    """

    def __init__(self, parameters: TrainableParameters, runtime: Runtime, *, due: Callable[[int], bool]) -> None:
        self._parameters = parameters
        self._runtime = runtime
        self._due = due

    def at_boundary(self, state: RunState) -> None:
        """Compares when it is due.

        Raises:
            DriftError: they differ; in all processes.
        """
        if self._due(state.step):
            self.compare(state)

    def compare(self, state: RunState) -> None:
        """Compares now, as before a checkpoint; collective.

        Raises:
            DriftError: they differ; in all processes.
        """
        names = self._parameters.names
        if differ := self._runtime.differing(self._bit_sums):
            raise DriftError(
                f"step {state.step}: the processes do not hold the same parameters any more ({len(differ)} of "
                f"{len(names)} tensors differ, such as {names[differ[0]]}): a device, a driver or an operation "
                "computed another result in one of them; nothing was saved since"
            )

    def _bit_sums(self) -> Tensor:
        self._parameters.settle()
        return bit_sums(self._parameters.tensors, device=self._runtime.device)


def bit_sums(tensors: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """(t,) int64 sum over each tensor of its elements' bits, read as integers, modulo 2^64; on `device`."""
    sums = [tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack([to_device(each, device) for each in sums])
