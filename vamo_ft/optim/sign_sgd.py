"""Descent along the gradient's signs."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["SignSgd"]


class SignSgd(torch.optim.Optimizer):
    """`x <- (1 - lr wd) x - lr sign(g)`; the decay is decoupled from the gradient, as AdamW's is.

    Source: Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems", arXiv 1802.04434; with
    loss differences: ZO-Bench, arXiv 2402.11592.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
