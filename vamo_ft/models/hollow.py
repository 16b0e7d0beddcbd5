"""A model without values, for a process that is given them by another one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vamo_ft.config.model import ModelConfig
from vamo_ft.models.loading import LoadedModel, load_outline

__all__ = ["load_hollow"]


def load_hollow(
    config: ModelConfig,
    *,
    offline: bool,
    num_labels: int | None,
    weights: Path | None = None,
    modules_to_save: Sequence[str] = (),
) -> LoadedModel:
    """What `load_model` gives, on torch's meta device: no weights are read, and no memory is taken for them.

    Args:
        weights: as for `load_model`.
        modules_to_save: layers that its adapter trains in full, as `trained_in_full` tells them where weights are read:
            which those of a new head are is found in what the weights lack.

    Raises:
        DataError: as `load_outline`.
    """
    if weights is not None and config.adapter is None:  # it holds the whole model, and `path` may be gone
        config = config.model_copy(update={"path": str(weights), "revision": None})
    loaded = load_outline(config, offline=offline, num_labels=num_labels, modules_to_save=modules_to_save)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in loaded.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_without_values(parameter), requires_grad=parameter.requires_grad)
            module.register_parameter(name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, _without_values(buffer), name not in module._non_persistent_buffers_set)
    return loaded


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
