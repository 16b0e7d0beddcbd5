"""Which matrices of a base bitsandbytes holds in 4 bits, and the memory that they take."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from vamo_ft.core.stack import layer_stacks

__all__ = ["four_bit_bytes", "four_bit_matrices"]

_BLOCK = 64  # weights with one scale
_SCALES = 256  # scales with one of their own


def four_bit_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The frozen matrices of the layers; embedding and head are not quantised."""
    modules = [module for stack in layer_stacks(model) for layer in stack for module in layer.modules()]
    weights = [module.weight for module in modules if type(module) in (nn.Linear, Conv1D)]
    return [weight for weight in weights if not weight.requires_grad]  # type: ignore[misc]


def four_bit_bytes(numel: int, *, double_quant: bool) -> int:
    """Of a matrix of `numel` weights, with its scales.

    Half a byte for each weight and a float32 for each block of 64; with `double_quant` a byte for each block, and a
    float32 for 256 of them.

    Source: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3.
    """
    blocks = -(-numel // _BLOCK)
    scales = blocks + 4 * -(-blocks // _SCALES) if double_quant else 4 * blocks
    return -(-numel // 2) + scales
