"""From the `model` section to the model on its device."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vamo_ft.assemble.stored import as_stored
from vamo_ft.config.data import ClassificationFormat, FormatConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.memory import memory_explained
from vamo_ft.core.protocols import Runtime
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.streaming import LayerStream
from vamo_ft.data.chat import set_chat_template
from vamo_ft.models.adapters import trained_in_full
from vamo_ft.models.hollow import load_hollow
from vamo_ft.models.loading import LoadedModel, load_model
from vamo_ft.training.runtime import build_runtime

__all__ = ["build_run_runtime", "load_run_model", "load_whole_model", "resident_parameters"]

_log = logging.getLogger("vamo_ft")

_SMALLER = (
    "take model.dtype: bfloat16, model.quantization with an adapter, training.stream_layers with method.name: mezo, or "
    "training.fsdp on several devices"
)


def load_run_model(config: RunConfig, *, runtime: Runtime, weights: Path | None, decoded: bool = False) -> LoadedModel:
    """The model on the runtime's device, all of it or what is not streamed.

    Of processes that share it out the main one reads it, and the others are given their parts.

    Args:
        weights: a saved `model/` folder that replaces its values.
        decoded: of weights that are stored in 4 bits take the values that they stand for.

    Raises:
        DataError: the model is not what the configuration says, or is quantised and the run cannot be.
        UsageError: it has no layers that could be streamed.
        DeviceMemoryError: the device is too small for it.
    """
    shared_out = runtime.share[1] > 1
    if runtime.is_main or not shared_out:
        loaded = load_model(
            config.model,
            offline=config.run.offline,
            seed=config.run.seed,
            num_labels=config.num_labels,
            class_names=() if config.num_labels is None else _class_names(config.data.format),
            weights=weights,
            decoded=decoded,
        )
        if shared_out:
            runtime.agreed(trained_in_full(loaded.model))
    else:
        loaded = load_hollow(
            config.model,
            offline=config.run.offline,
            num_labels=config.num_labels,
            weights=weights,
            modules_to_save=runtime.agreed(None),
        )
    config = as_stored(config, loaded.four_bits)
    if loaded.four_bits is not None and loaded.four_bits.stored:
        _log.info("%s is stored in 4 bits: %s", config.model.path, loaded.four_bits)
    set_chat_template(loaded.tokenizer, config.data.chat_template)
    with memory_explained("bringing the model to the device", remedy=_SMALLER):
        if config.training.stream_layers:
            resident = resident_parameters(config, loaded)
            return replace(loaded, stream=LayerStream(loaded.model, runtime.device, resident=resident))
        if loaded.four_bits is None:  # else it is there already, and does not move
            runtime.place(loaded.root)
    return loaded


def _class_names(written: FormatConfig) -> tuple[str, ...]:
    """The texts of the labels, which a classifier head has no other use for, where they tell classes apart."""
    texts = [text.strip() for text in written.labels.values()] if isinstance(written, ClassificationFormat) else []
    return tuple(texts) if texts and len({*texts}) == len(texts) else written.classes


def resident_parameters(config: RunConfig, loaded: LoadedModel) -> list[nn.Parameter]:
    """Those in layers that are not streamed: an adapter's, which are small."""
    return [] if config.model.adapter is None else [p for p in loaded.model.parameters() if p.requires_grad]


def load_whole_model(config: RunConfig, *, weights: Path, decoded: bool = False) -> LoadedModel:
    """The model in one piece: on the host where the run streams its layers, else on the device.

    Args:
        decoded: as for `load_run_model`.
    """
    whole = config.training.model_copy(update={"stream_layers": False})
    runtime = LocalRuntime() if config.training.stream_layers else build_run_runtime(config)
    config = config.model_copy(update={"training": whole})
    return load_run_model(config, runtime=runtime, weights=weights, decoded=decoded)


def build_run_runtime(config: RunConfig) -> Runtime:
    """Device and precision of the configuration's forward passes."""
    return build_runtime(autocast=torch.bfloat16 if config.training.autocast else None, fsdp=config.training.fsdp)
