"""How parameters are laid out as rows for the kernels.

A large tensor becomes R rows of equal width, at most 65,536 elements, so that a row meets at most two blocks of the
hash. Small tensors of the same size and type are stacked, one row each, so that hundreds of them cost one launch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.hashing import BLOCK
from vamo_ft.core.transfer import to_device

__all__ = ["Launch", "RowPlan", "row_positions"]


@dataclass(frozen=True, slots=True)
class Launch:
    """The rows of one kernel call.

    Attributes:
        places: which tensors; several are small and of one size.
        first: element of the (then single) tensor at which the rows begin.
        shape: (R, W).
        rows: where these rows stand among all rows of the plan.
    """

    places: tuple[int, ...]
    first: int
    shape: tuple[int, int]
    rows: slice


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Launches that cover some tensors.

    Attributes:
        launches: in no particular order; every element belongs to one.
        blocks: (rows,) int64, the block of each row's first element.
        starts: (rows, 1) int32, that element's position in its block.
    """

    launches: tuple[Launch, ...]
    blocks: Tensor
    starts: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor], offsets: Sequence[int]) -> "RowPlan":
        """The plan for tensors whose first elements have these offsets in the vector of all parameters."""
        pieces: list[tuple[tuple[int, ...], int, tuple[int, int]]] = []
        stacks: dict[tuple[int, torch.dtype], list[int]] = {}
        for place, tensor in enumerate(tensors):
            if tensor.numel() == 0:  # other processes hold it
                continue
            if tensor.numel() < BLOCK:
                stacks.setdefault((tensor.numel(), tensor.dtype), []).append(place)
            else:
                pieces.extend(((place,), first, shape) for first, shape in _cut(tensor.numel()))
        pieces.extend((tuple(places), 0, (len(places), numel)) for (numel, _), places in stacks.items())
        launches: list[Launch] = []
        row_offsets: list[int] = []
        for places, first, (rows, width) in pieces:
            launches.append(Launch(places, first, (rows, width), slice(len(row_offsets), len(row_offsets) + rows)))
            if len(places) > 1:
                row_offsets.extend(offsets[place] for place in places)
            else:
                row_offsets.extend(range(offsets[places[0]] + first, offsets[places[0]] + first + rows * width, width))
        blocks, starts = row_positions(torch.tensor(row_offsets, dtype=torch.int64), device=tensors[0].device)
        return cls(tuple(launches), blocks, starts)

    def by_row(self, values: Sequence[float]) -> Tensor:
        """(rows, 1) float64, the value of the tensor that each row belongs to."""
        rows = torch.empty(len(self.blocks), 1, dtype=torch.float64)
        for launch in self.launches:
            chosen = torch.tensor([values[place] for place in launch.places], dtype=torch.float64).unsqueeze(1)
            rows[launch.rows] = chosen.expand(launch.shape[0], 1)
        return to_device(rows, self.blocks.device)


def row_positions(offsets: Tensor, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block (rows,) int64 and position in it (rows, 1) int32 of the elements at `offsets` (rows,) int64."""
    offsets = to_device(offsets, device)
    return offsets // BLOCK, (offsets % BLOCK).to(torch.int32).unsqueeze(1)


def _cut(numel: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """First element and (R, W) of the pieces of a large tensor: one where a width divides it, else body and tail."""
    fewest = max(2, -(-numel // BLOCK))
    for rows in range(fewest, 4 * fewest):
        if numel % rows == 0:
            yield 0, (rows, numel // rows)
            return
    body = numel // BLOCK * BLOCK
    yield 0, (numel // BLOCK, BLOCK)
    yield body, (1, numel - body)
