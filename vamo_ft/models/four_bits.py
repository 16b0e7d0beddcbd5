"""A base whose matrices bitsandbytes holds in 4 bits: how it is loaded, which they are, what memory they take."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from vamo_ft.config.model import QuantizationConfig
from vamo_ft.core.errors import DataError
from vamo_ft.core.stack import layer_stacks

__all__ = ["check_four_bits", "check_outline", "four_bit_bytes", "four_bit_matrices", "four_bits", "kept_whole"]

_BLOCK = 64  # weights with one scale
_SCALES = 256  # scales with one of their own
_IN_FULL = {"original_module", "modules_to_save"}  # in peft's names of layers that it trains in full


def four_bits(config: QuantizationConfig, *, compute_dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
    """Arguments of `from_pretrained`; weights are quantised on their way to the device.

    Args:
        kept: names of modules that are not quantised, see `kept_whole`. Left to itself transformers also quantises a
            classifier's head that has a bias.
    """
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=list(kept),
        ),
        "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    }


def kept_whole(model: nn.Module, *, in_full: Iterable[str]) -> list[str]:
    """Names of the modules whose matrices are not quantised: all around the layers, and what an adapter trains in full.

    Args:
        model: as it is without quantisation; outlines will do.
        in_full: the adapter's `modules_to_save`.
    """
    inside = {id(part) for stack in layer_stacks(model) for layer in stack for part in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) and id(module) not in inside)
        or any(name == each or name.endswith(f".{each}") for each in in_full)
    ]


def check_four_bits(model: nn.Module, *, path: str) -> None:
    """Sees to what bitsandbytes (0.50) does with matrices on the CPU.

    In the first evaluation it would repack them, where the processor multiplies bfloat16, to a form that has rounded
    scales and no backward pass. Its kernels take a block of weights for a part of one row.

    Raises:
        DataError: nothing is quantised, or a matrix has rows of another length.
    """
    quantised = [(name, module) for name, module in model.named_modules() if _holds_four_bits(module)]
    for _, module in quantised:
        module.support_avx512bf16_for_cpu = False
    on_cpu = any(module.weight.device.type == "cpu" for _, module in quantised)
    _check_rows({name: module.in_features for name, module in quantised}, path=path, on_cpu=on_cpu)


def check_outline(model: nn.Module, *, path: str, on_cpu: bool) -> None:
    """The same of a model that is not quantised yet.

    Args:
        on_cpu: whether it is to run there.

    Raises:
        DataError: as `check_four_bits`.
    """
    matrices = {id(matrix) for matrix in four_bit_matrices(model)}
    rows = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module.weight.shape[
            0 if isinstance(module, Conv1D) else 1
        ]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in matrices
    }
    _check_rows(rows, path=path, on_cpu=on_cpu)


def _check_rows(rows: Mapping[str, int], *, path: str, on_cpu: bool) -> None:
    if not rows:
        raise DataError(
            f"model.quantization: {path}: the model has no stack of layers with matrices to quantise; leave it out"
        )
    for name, length in rows.items():
        if on_cpu and length % _BLOCK:
            raise DataError(
                f"model.quantization: {path}: {name} has rows of {length} weights, and on the CPU they must be "
                f"multiples of {_BLOCK}; leave it out, or run on CUDA"
            )


def _holds_four_bits(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def four_bit_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The frozen matrices of the layers, without those of `kept_whole`, of a model that is not quantised."""
    modules = [
        module
        for stack in layer_stacks(model)
        for layer in stack
        for name, module in layer.named_modules()
        if type(module) in (nn.Linear, Conv1D) and _IN_FULL.isdisjoint(name.split("."))
    ]
    weights = [module.weight for module in modules]
    return [weight for weight in weights if not weight.requires_grad]


def four_bit_bytes(numel: int, *, double_quant: bool) -> int:
    """Of a matrix of `numel` weights, with its scales.

    Half a byte for each weight and a float32 for each block of 64; with `double_quant` a byte for each block, and a
    float32 for 256 of them.

    Source: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3.
    """
    blocks = -(-numel // _BLOCK)
    scales = blocks + 4 * -(-blocks // _SCALES) if double_quant else 4 * blocks
    return -(-numel // 2) + scales
