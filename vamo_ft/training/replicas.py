"""Whether all processes of a run hold the same parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vamo_ft.core.errors import DriftError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Runtime
from vamo_ft.core.transfer import to_device
from vamo_ft.training.callbacks import Callback
from vamo_ft.training.state import RunState

__all__ = ["ReplicaCheck", "bit_sums"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck(Callback):
    """Compares the parameters of all processes, by the sums of their bit patterns.

    A step that is not the same everywhere, as by a defect of a device, would otherwise train something that no single
    process holds. A drift that began is never undone.

    Args:
        due: whether they are compared after so many steps.
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
            self.on_stop(state)

    def on_stop(self, state: RunState) -> None:
        """Compares what is about to be saved.

        Raises:
            DriftError: they differ; in all processes.
        """
        names = self._parameters.names
        if differ := self._runtime.differing(self._bit_sums):
            raise DriftError(
                f"step {state.step}: the processes do not hold the same parameters any more ({len(differ)} of "
                f"{len(names)} tensors differ, such as {names[differ[0]]}): a device, a driver or an operation "
                "computed another result in one of them; go on from the last checkpoint, which is from before"
            )

    def _bit_sums(self) -> Tensor:
        self._parameters.settle()
        return bit_sums(self._parameters.tensors, device=self._runtime.device)


def bit_sums(tensors: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """(t,) int64 sum over each tensor of its elements' bits, read as integers, modulo 2^64; on `device`."""
    sums = [tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack([to_device(each, device) for each in sums])
