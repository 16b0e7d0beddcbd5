"""A base whose matrices bitsandbytes holds in 4 bits: which they are, how it is loaded, what memory they take."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from vamo_ft.config.model import QuantizationConfig
from vamo_ft.core.errors import DataError
from vamo_ft.core.stack import layer_stacks

__all__ = [
    "FourBits",
    "cast_others",
    "check_four_bits",
    "check_outline",
    "decode",
    "four_bit_bytes",
    "four_bits",
    "kept_whole",
    "on_device",
]

_BLOCK = 64  # weights with one scale
_SCALES = 256  # scales with one of their own


@dataclass(frozen=True, slots=True)
class FourBits:
    """How a base is held in 4 bits.

    Attributes:
        config: code, scales, and precision of the products.
        kept: names of the modules that are not quantised, as transformers takes them: beginnings or ends of names.
        stored: whether its files hold it so; else it is quantised on the way to the device.
        decoded: precision that it was quantised from, in which a backward pass forms a matrix before it rounds it to
            that of the products.
        matrices: rows and columns of those that are held so, as `nn.Linear` has them, by the names of their modules.
    """

    config: QuantizationConfig
    kept: Sequence[str]
    stored: bool
    decoded: torch.dtype
    matrices: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        config: QuantizationConfig,
        *,
        kept: Sequence[str],
        decoded: torch.dtype,
        stored: bool = False,
    ) -> "FourBits":
        """Of a model without an adapter, as it is without quantisation; outlines will do."""
        kept = sorted({*kept, *(model._keep_in_fp32_modules or ())})  # transformers adds these itself
        matrices: dict[str, tuple[int, int]] = {}
        for name, module in model.named_modules():
            if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, kept):
                first, second = module.weight.shape
                matrices[name] = (second, first) if isinstance(module, Conv1D) else (first, second)
        return cls(config, kept, stored, decoded, matrices)

    @property
    def sizes(self) -> list[int]:
        """Weights of each matrix."""
        return [rows * columns for rows, columns in self.matrices.values()]

    @property
    def num_bytes(self) -> int:
        """Of all matrices with their scales."""
        return sum(four_bit_bytes(size, double_quant=self.config.double_quant) for size in self.sizes)

    @property
    def present_bytes(self) -> int:
        """Of the largest matrix while it is multiplied."""
        products = getattr(torch, self.config.compute_dtype)
        widths = {dtype: dtype.itemsize for dtype in (self.decoded, products)}
        return sum(widths.values()) * max(self.sizes, default=0)

    def __str__(self) -> str:
        scales = "quantised scales" if self.config.double_quant else "float32 scales"
        return f"{self.config.type} with {scales}, products in {self.config.compute_dtype}"


def four_bits(config: QuantizationConfig, *, kept: Sequence[str]) -> dict[str, Any]:
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
            bnb_4bit_compute_dtype=config.compute_dtype,
            llm_int8_skip_modules=list(kept),
        ),
        **on_device(),
    }


def on_device() -> dict[str, Any]:
    """Arguments of `from_pretrained` that put all on the device of the run, from which 4 bits do not move."""
    return {"device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}}


def kept_whole(model: PreTrainedModel, *, in_full: Iterable[str]) -> list[str]:
    """Names of the modules whose matrices are not quantised: all around the layers, and what an adapter trains in full.

    In a model without a stack of layers all of its base counts as one, without what gives the logits.

    Args:
        model: as it is without quantisation; outlines will do.
        in_full: the adapter's `modules_to_save`.
    """
    layers: Iterable[nn.Module] = [layer for stack in layer_stacks(model) for layer in stack] or [model.base_model]
    inside = {id(part) for layer in layers for part in layer.modules()} - {id(model.get_output_embeddings())}
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


def cast_others(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Brings what is not quantised to `dtype`, which transformers (5.23) leaves as it is stored beside 4 bits."""
    always_float32 = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            in_float32 = any(part in name.split(".") for part in always_float32)
            parameter.data = parameter.data.to(torch.float32 if in_float32 else dtype)


@torch.no_grad()
def decode(model: PreTrainedModel) -> None:
    """Puts matrices of the values that 4 bits stand for in their place, in the model's precision."""
    transposed = [
        name for name, module in model.named_modules() if _holds_four_bits(module) and module.source_cls is Conv1D
    ]
    model.dequantize()
    for name in transposed:  # which transformers makes `nn.Linear` of
        linear = model.get_submodule(name)
        conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight, conv.bias = nn.Parameter(linear.weight.T.contiguous()), linear.bias
        model.set_submodule(name, conv)


def check_outline(held: FourBits, *, path: str, on_cpu: bool) -> None:
    """The same of a model that is not loaded yet.

    Args:
        on_cpu: whether it is to run there.

    Raises:
        DataError: as `check_four_bits`.
    """
    _check_rows({name: columns for name, (_, columns) in held.matrices.items()}, path=path, on_cpu=on_cpu)


def _check_rows(rows: Mapping[str, int], *, path: str, on_cpu: bool) -> None:
    if not rows:
        raise DataError(f"model.quantization: {path}: the model has no matrices to quantise; leave it out")
    for name, length in rows.items():
        if on_cpu and length % _BLOCK:
            raise DataError(
                f"model.quantization: {path}: {name} has rows of {length} weights, and on the CPU they must be "
                f"multiples of {_BLOCK}; take weights that are not quantised, or run on CUDA"
            )


def _holds_four_bits(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def four_bit_bytes(numel: int, *, double_quant: bool) -> int:
    """Of a matrix of `numel` weights, with its scales.

    Half a byte for each weight and a float32 for each block of 64; with `double_quant` a byte for each block, and a
    float32 for 256 of them.

    Source: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3.
    """
    blocks = -(-numel // _BLOCK)
    scales = blocks + 4 * -(-blocks // _SCALES) if double_quant else 4 * blocks
    return -(-numel // 2) + scales
