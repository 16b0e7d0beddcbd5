"""Structures of directions at the probe points of a language model."""

from collections.abc import Callable

import pytest
import torch

from tests.tiny import tiny_llama
from vamo_ft.core.blocks import BlockDirections, model_blocks
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.factored import LowRankDirections, SubspaceDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import Perturber
from vamo_ft.core.protocols import Directions
from vamo_ft.core.sparse import SparseDirections

TOKENS = torch.arange(24).view(2, 12) + 5


def model(dtype: torch.dtype) -> torch.nn.Module:
    module = tiny_llama().to(dtype)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("norm" not in name)
    return module


STRUCTURES: dict[str, Callable[[torch.nn.Module, TrainableParameters], Directions]] = {
    "block": lambda module, owner: BlockDirections(
        HashedDirections(owner), model_blocks(module, owner), order="cyclic"
    ),
    "low_rank": lambda module, owner: LowRankDirections(owner, rank=2, refresh_every=2),
    "subspace": lambda module, owner: SubspaceDirections(owner, rank=8, refresh_every=2),
    "sparse": lambda module, owner: SparseDirections(owner, quantile=0.25),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_streamed_probe_point_is_the_copied_one(structure: str, dtype: torch.dtype, autocast: bool) -> None:
    """Layers are displaced in the forward pass, from the weights themselves, and to the same bits as all at once."""
    module = model(dtype)
    owner = TrainableParameters(module)
    directions, digest = STRUCTURES[structure](module, owner), owner.digest()

    def logits() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return module(TOKENS).logits

    base = logits()
    for step in range(2):
        points = []
        for whole in (True, False):
            perturber = Perturber(module, owner, directions, whole=whole)
            with perturber.at(HashKey(3, Domain.DIRECTION, step, 0), 0.05):
                points.append(perturber.checked(logits))
        assert torch.equal(*points)
        assert not torch.equal(points[0], base)
        assert owner.digest() == digest
