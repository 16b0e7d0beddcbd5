"""From the `method` section to the directions that a method perturbs along."""

import logging

import torch
from torch import nn

from vamo_ft.config.method import FirstOrderConfig, SvrgConfig, VamoConfig, VamoLiteralConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.blocks import BlockDirections, model_blocks
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.factored import LowRankDirections, SubspaceDirections
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.kernels import worth_compiling
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions
from vamo_ft.core.runtime import free_memory_bytes
from vamo_ft.core.sparse import SparseDirections

__all__ = ["are_compiled", "build_directions"]

_log = logging.getLogger("vamo_ft")


def build_directions(config: RunConfig, parameters: TrainableParameters, module: nn.Module) -> Directions | None:
    """The directions of a method that perturbs; None for back-propagation alone."""
    if isinstance(config.method, FirstOrderConfig | SvrgConfig):
        return None
    if isinstance(config.method, VamoLiteralConfig):
        return HashedDirections(parameters, distribution="sphere")
    directions = config.method.directions
    law, rank, refresh_every = directions.distribution, directions.rank, directions.refresh_every
    match directions.structure:
        case "full":
            return HashedDirections(parameters, distribution=law)
        case "block":
            assert directions.order is not None
            hashed, blocks = HashedDirections(parameters, distribution=law), model_blocks(module, parameters)
            _log.info("directions: %d blocks, one a step", len(blocks))
            return BlockDirections(hashed, blocks, order=directions.order)
        case "low_rank":
            assert law != "sphere" and rank is not None and refresh_every is not None
            return LowRankDirections(parameters, rank=rank, refresh_every=refresh_every, distribution=law)
        case "subspace":
            assert law != "sphere" and rank is not None and refresh_every is not None
            return SubspaceDirections(parameters, rank=rank, refresh_every=refresh_every, distribution=law)
        case "sparse":
            assert directions.quantile is not None
            return SparseDirections(parameters, quantile=directions.quantile, distribution=law)
        case "gradient_subspace":
            assert directions.warmup_steps is not None
            assert isinstance(config.method, VamoConfig)
            offload = config.method.snapshot.offload
            size, warmup = config.method.probes, directions.warmup_steps
            return _gradient_subspace(parameters, size=size, warmup=warmup, offload=offload)


def are_compiled(config: RunConfig, numel: int, device_type: str) -> bool:
    """Whether the method's directions over `numel` elements are made by compiled kernels."""
    method = config.method
    if isinstance(method, FirstOrderConfig | SvrgConfig):
        return False
    return method.structure != "gradient_subspace" and worth_compiling(numel, device_type)


def _gradient_subspace(parameters: TrainableParameters, *, size: int, warmup: int, offload: bool) -> GradientSubspace:
    place = torch.device("cpu") if offload else parameters.device
    needed, free = GradientSubspace.state_bytes(parameters.num_held, size), free_memory_bytes(place)
    if needed > free:
        elsewhere = ", or keep them in host memory (method.snapshot.offload)" if place.type == "cuda" else ""
        raise UsageError(
            f"method.directions.structure: gradient_subspace keeps {3 * size + 1} float32 vectors of "
            f"{parameters.num_held:,} elements, {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; train an "
            f"adapter, or lower method.probes{elsewhere}"
        )
    return GradientSubspace(parameters, size=size, warmup=warmup, offload=offload)
