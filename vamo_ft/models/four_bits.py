"""A base whose matrices bitsandbytes holds in 4 bits: how it is loaded, which they are, what memory they take."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from vamo_ft.config.model import QuantizationConfig
from vamo_ft.core.errors import DataError
from vamo_ft.core.stack import layer_stacks

__all__ = ["check_four_bits", "four_bit_bytes", "four_bit_matrices", "four_bits"]

_BLOCK = 64  # weights with one scale
_SCALES = 256  # scales with one of their own


def four_bits(config: QuantizationConfig, *, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`; weights are quantised on their way to the device."""
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        ),
        "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    }


def check_four_bits(model: nn.Module, *, path: str) -> None:
    """Sees to what bitsandbytes (0.50) does with matrices on the CPU.

    In the first evaluation it would repack them, where the processor multiplies bfloat16, to a form that has rounded
    scales and no backward pass. Its kernels take a block of weights for a part of one row.

    Raises:
        DataError: a matrix has rows of another length.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.weight.device.type == "cpu" and module.in_features % _BLOCK:
            raise DataError(
                f"model.quantization: {path}: {name} has rows of {module.in_features} weights, and on the CPU they "
                f"must be multiples of {_BLOCK}; leave it out, or run on CUDA"
            )


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
