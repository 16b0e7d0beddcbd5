"""A base whose files hold quantised weights: what its config.json says of them, and whether adapters can use them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from vamo_ft.config.model import ModelConfig, QuantizationConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models.four_bits import FourBits

__all__ = ["load_as", "stored_four_bits", "stored_quantization"]


def stored_quantization(model_config: PreTrainedConfig, config: ModelConfig) -> QuantizationConfig | None:
    """How the weights that `model_config` belongs to are quantised; None: they are not.

    The precision of the products is no property of the weights: it is that of `model.quantization`, and where that is
    left out the stored one. float16 becomes bfloat16, of which training needs the range.

    Raises:
        DataError: they are quantised in another way than by bitsandbytes in 4 bits, or `model.quantization` contradicts
            them.
    """
    settings = _settings(model_config)
    if settings is None:
        return None
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "bitsandbytes"))
    if method != "bitsandbytes" or not settings.get("load_in_4bit"):
        kind = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
        raise DataError(
            f"model.path: {config.path}: its weights are quantised by {kind} (quantization_config in config.json), and "
            "adapters are trained on bitsandbytes' 4 bits alone; write the model that they were made from, and "
            "model.quantization for weights of 4 bits"
        )
    stored = {
        "type": settings.get("bnb_4bit_quant_type", "fp4"),  # these are what the library takes a missing key for
        "double_quant": settings.get("bnb_4bit_use_double_quant", False),
    }
    if config.quantization is not None:
        for key, value in stored.items():
            if (written := getattr(config.quantization, key)) != value:
                raise DataError(
                    f"model.quantization.{key}: {_yaml(written)} contradicts {config.path}, whose weights are stored "
                    f"with {_yaml(value)}; write {_yaml(value)}, or leave model.quantization out"
                )
        return config.quantization
    precision = str(settings.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    return QuantizationConfig(bits=4, compute_dtype="float32" if precision == "float32" else "bfloat16", **stored)


def stored_four_bits(
    outline: PreTrainedModel, quantization: QuantizationConfig, model_config: PreTrainedConfig, config: ModelConfig
) -> FourBits:
    """Which matrices the files hold in 4 bits.

    Args:
        outline: of the model, without an adapter.

    Raises:
        DataError: the adapter would train some of them in full.
    """
    settings = _settings(model_config)
    assert settings is not None
    kept = HfQuantizer.get_modules_to_not_convert(outline, settings.get("llm_int8_skip_modules"))
    if config.task == "sequence_classification":  # its head is not stored, or not quantised
        kept.extend(_heads(outline))
    decoded = getattr(torch, str(model_config.dtype or config.dtype).removeprefix("torch."))
    held = FourBits.of(outline, quantization, kept=kept, decoded=decoded, stored=True)
    for each in [] if config.adapter is None else config.adapter.modules_to_save:
        if any(f".{each}." in f".{name}." for name in held.matrices):
            raise DataError(
                f"model.adapter.modules_to_save: {each!r} is stored in 4 bits, and quantised weights are not trained; "
                f"leave it out, or write the model that {config.path} was made from, and model.quantization"
            )
    return held


def load_as(model_config: PreTrainedConfig, held: FourBits) -> None:
    """Lets `from_pretrained` read them so; what it is given beside the model's own settings it passes over."""
    settings = _settings(model_config)
    assert settings is not None
    settings |= {"bnb_4bit_compute_dtype": held.config.compute_dtype, "llm_int8_skip_modules": list(held.kept)}


def _settings(model_config: PreTrainedConfig) -> dict[str, Any] | None:
    """`quantization_config` of config.json, which a model of several parts has with that of its text."""
    for each in (model_config, model_config.get_text_config(decoder=True)):
        settings: Any = getattr(each, "quantization_config", None)
        if settings is not None:
            return settings if isinstance(settings, dict) else dict(settings.to_dict())
    return None


def _heads(outline: PreTrainedModel) -> Iterator[str]:
    base: Iterable[nn.Module] = outline.base_model.modules()
    inside = {id(module) for module in base}
    for name, module in outline.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside:
            yield name


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
