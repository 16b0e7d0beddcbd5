"""Directions that reach one block of the model in each step (MeZO-BCD)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor, nn

from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.second_moment import SecondMoment, squared_norm
from vamo_ft.core.stack import stacked_layers

__all__ = ["Block", "BlockDirections", "BlockOrder", "block_at", "model_blocks"]

BlockOrder = Literal["random_permutation", "cyclic", "random", "flip_flop"]


@dataclass(frozen=True, slots=True)
class Block:
    """Parameters that are perturbed together: the name of the module that holds them, and their numbers, ascending."""

    name: str
    indices: tuple[int, ...]


def model_blocks(module: nn.Module, parameters: TrainableParameters) -> tuple[Block, ...]:
    """The blocks of a model in the order of its modules; every trainable tensor belongs to exactly one.

    Each layer of a stack is a block, and outside the stacks each module that owns trainable tensors directly: the
    embedding, the last norm, the head. A tied tensor belongs to the first block that holds it.
    """
    layers = set(stacked_layers(module))

    def walk(name: str, part: nn.Module) -> Iterator[tuple[str, Iterable[nn.Parameter]]]:
        if part in layers:
            yield name, part.parameters()
            return
        yield name, part.parameters(recurse=False)
        for child_name, child in part.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    left = {id(tensor): index for index, tensor in enumerate(parameters.registered)}
    blocks = []
    for name, tensors in walk("", module):
        if indices := [left.pop(id(tensor)) for tensor in tensors if id(tensor) in left]:
            blocks.append(Block(name or "model", tuple(sorted(indices))))
    return tuple(blocks)


@lru_cache(maxsize=16)
def block_at(step: int, *, order: BlockOrder, num_blocks: int, seed: int) -> int:
    """The block of step `step`, known for every step without going through the earlier ones.

    | order | blocks |
    |---|---|
    | random_permutation | each once in every cycle of `num_blocks` steps, every cycle in another order |
    | cyclic | 0, 1, ..., n - 1, and again |
    | random | drawn uniformly and independently |
    | flip_flop | 0, ..., n - 1, n - 1, ..., 0, and again |
    """
    cycle, position = divmod(step, num_blocks)
    match order:
        case "random_permutation":
            words = _words(seed, cycle, num_blocks)
            return sorted(range(num_blocks), key=lambda block: (words[block], block))[position]
        case "cyclic":
            return position
        case "random":
            return _words(seed, step, 1)[0] * num_blocks >> 32
        case "flip_flop":
            return position if cycle % 2 == 0 else num_blocks - 1 - position


class BlockDirections:
    """Hashed directions on one block a step; the other tensors are neither read nor written.

    All keys of a call belong to one step, which names the block (implements `core.protocols.Directions`).

    Source: MeZO-BCD, arXiv 2501.19099.
    """

    rowwise = True

    def __init__(self, directions: HashedDirections, blocks: Sequence[Block], *, order: BlockOrder) -> None:
        self._directions = directions
        self._blocks = blocks
        self._order = order

    @property
    def numel(self) -> int:
        """d, of all blocks together."""
        return self._directions.numel

    @property
    def num_blocks(self) -> int:
        """Length of a cycle, in steps."""
        return len(self._blocks)

    def block(self, keys: Sequence[HashKey]) -> Block:
        """The block that the directions reach."""
        seed, _, step, _ = keys[0]
        assert all((key.seed, key.step) == (seed, step) for key in keys), "directions of one step reach one block"
        return self._blocks[block_at(step, order=self._order, num_blocks=len(self._blocks), seed=seed)]

    def support(self, keys: Sequence[HashKey]) -> tuple[int, ...]:
        """The tensors of the step's block."""
        return self.block(keys).indices

    def axpy_(
        self,
        tensors: Sequence[Tensor],
        coefficients: Tensor,
        keys: Sequence[HashKey],
        *,
        scales: Sequence[float] | None = None,
        rounding: HashKey | None = None,
        sources: Sequence[Tensor] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        """As `HashedDirections.axpy_`, on the block."""
        indices = range(len(tensors)) if indices is None else indices
        reached = set(self.support(keys))
        places = [place for place, index in enumerate(indices) if index in reached]
        if places:
            self._directions.axpy_(
                [tensors[place] for place in places],
                coefficients,
                keys,
                scales=None if scales is None else [scales[place] for place in places],
                rounding=rounding,
                sources=None if sources is None else [sources[place] for place in places],
                indices=[indices[place] for place in places],
            )

    def displaced_rows(
        self,
        values: Tensor,
        rows: Tensor,
        *,
        index: int,
        coefficients: Tensor,
        keys: Sequence[HashKey],
        rounding: HashKey | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `HashedDirections.displaced_rows`, for a matrix of the block."""
        assert index in self.support(keys), "outside the block nothing is displaced"
        return self._directions.displaced_rows(
            values, rows, index=index, coefficients=coefficients, keys=keys, rounding=rounding, out=out
        )

    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        """(m,) float64 inner products `<tensors, z_j>`, over the block."""
        reached = set(self.support(keys))
        return self._directions.dots(
            [tensor if index in reached else None for index, tensor in enumerate(tensors)], keys
        )

    def gram(self, keys: Sequence[HashKey]) -> Tensor:
        """(m, m) float64, `G_jk = <z_j, z_k>`, over the block."""
        return self._directions.gram(keys, indices=self.support(keys))

    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        """The identity on the step's block (see `SecondMoment`)."""
        return self._on(self.block(keys), gradients)

    def second_moments(self, gradients: Sequence[Tensor | None]) -> Mapping[str, SecondMoment]:
        """By name of the block, for each of them."""
        return {block.name: self._on(block, gradients) for block in self._blocks}

    def _on(self, block: Block, gradients: Sequence[Tensor | None]) -> SecondMoment:
        numel = self._directions.reached(block.indices)
        return SecondMoment.identity_on(numel, squared_norm(gradients[index] for index in block.indices), gradients)


def _words(seed: int, step: int, count: int) -> list[int]:
    """Random numbers from 0 to 2**32 - 1."""
    return [HashKey(seed, Domain.BLOCK_ORDER, step, index).words[0] for index in range(count)]
