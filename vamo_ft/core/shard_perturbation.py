"""Probe points of a module whose parameters are shared out over processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import point_rounding
from vamo_ft.core.protocols import Directions

__all__ = ["ShardPerturber"]


class ShardPerturber:
    """Puts a shared-out module (`core.sharding`) at probe points: every process displaces the rows that it holds.

    An element's direction, and the bits that round it, are those of its offset in the whole vector, so that the rows of
    all processes together are what one process would compute with, bit for bit. FSDP2 puts its units together from the
    memory of the rows: they are written to, and written back from a copy afterwards, which takes a process as much
    memory again as the rows that the direction reaches. Nothing is put together while a point is entered or left.
    """

    def __init__(self, parameters: TrainableParameters, directions: Directions) -> None:
        self._parameters = parameters
        self._directions = directions

    @contextmanager
    def at(self, key: HashKey, coefficient: float) -> Iterator[None]:
        """Within the block the module computes at `x + coefficient * z(key)`; afterwards, also after an error, at x."""
        support = self._directions.support([key])
        tensors = [self._parameters.tensors[index] for index in support]
        own = [tensor.detach().clone() for tensor in tensors]
        coefficients = torch.full((1,), coefficient, dtype=torch.float64, device=self._parameters.device)
        try:
            self._directions.axpy_(
                tensors,
                coefficients,
                [key],
                rounding=point_rounding(key, coefficient),
                sources=own,
                indices=support,
            )
            yield
        finally:
            with torch.no_grad():
                for tensor, values in zip(tensors, own, strict=True):
                    tensor.copy_(values)

    def checked(self, evaluate: Callable[[], Tensor], *, plain: Callable[[], Tensor] | None = None) -> Tensor:
        """`evaluate()`: nothing is streamed that a model could miss."""
        return evaluate()
