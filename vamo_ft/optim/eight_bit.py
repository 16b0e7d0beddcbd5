"""AdamW with 8-bit moments, or with moments that may leave the device: bitsandbytes' rules.

A moment of 8 bits is an index into a table of 256 values (`qmap1`, `qmap2`), times the largest magnitude of its block
(`absmax1`, `absmax2`, float32). Tensors under 4,096 elements have float32 moments. Paged moments lie in memory that
CUDA moves between device and host by need.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["build_from_bitsandbytes", "fill_buffers", "is_from_bitsandbytes"]

_CLASSES: Mapping[str, str] = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}


def build_from_bitsandbytes(
    name: str, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """The rule of that name over the groups; bitsandbytes has to be installed."""
    kind = getattr(import_module("bitsandbytes").optim, _CLASSES[name])
    rule: torch.optim.Optimizer = kind(groups, lr=0.0, betas=betas, eps=eps)
    return rule


def is_from_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the rule makes its buffers itself, and not as torch does."""
    return hasattr(optimizer, "init_state")


@torch.no_grad()
def fill_buffers(optimizer: Any, parameter: nn.Parameter, saved: Mapping[str, Tensor | float]) -> None:
    """Restores the moments of one parameter.

    The rule makes its buffers, paged ones where it pages, and the saved values are copied into them: what a checkpoint
    holds lies in plain host memory.

    Raises:
        ValueError: the values are not what this rule keeps.
    """
    number, place, group = next(
        (number, place, group)
        for number, group in enumerate(optimizer.param_groups)
        for place, each in enumerate(group["params"])
        if each is parameter
    )
    optimizer.init_state(group, parameter, number, place)
    state = optimizer.state[parameter]
    if state.keys() != saved.keys():
        raise ValueError(f"the optimizer keeps {', '.join(sorted(state))}, not {', '.join(sorted(saved))}")
    for key, value in saved.items():
        if isinstance(value, Tensor):
            if (value.dtype, value.shape) != (state[key].dtype, state[key].shape):
                raise ValueError(f"the optimizer's {key} is {state[key].dtype} {tuple(state[key].shape)}")
            state[key].copy_(value)
        else:
            state[key] = value
