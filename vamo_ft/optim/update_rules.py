"""`torch.optim` behind the update-rule contract."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from vamo_ft.core.dense import dense_sum
from vamo_ft.core.errors import DivergenceError
from vamo_ft.core.protocols import Directions, StateDict
from vamo_ft.core.types import Estimate, ProjectedGradient
from vamo_ft.optim.carriers import MASTER, Carriers
from vamo_ft.optim.decay import decays
from vamo_ft.optim.eight_bit import build_from_bitsandbytes, fill_buffers, is_from_bitsandbytes
from vamo_ft.optim.sign_sgd import SignSgd

__all__ = ["DenseRule", "OptimizerName", "build_optimizer"]

OptimizerName = Literal["sgd", "adamw", "adagrad", "sign_sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def build_optimizer(
    carriers: Carriers,
    *,
    name: OptimizerName,
    weight_decay: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """The rule over the carriers, without weight decay for biases and norms.

    sgd and adagrad add `weight_decay * x` to the gradient; adamw, in all its forms, and sign_sgd decay decoupled from
    it. Those with 8bit or paged in their name are bitsandbytes'; nothing is paged without CUDA.

    Args:
        eps: added to adamw's or adagrad's denominator; None takes torch's default.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in carriers.tensors if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in carriers.tensors if not decays(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match name:
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov)
        case "adamw":
            # torch's own choice on CUDA takes several passes and temporaries of the parameters' size; on the CPU there
            # is nothing to gain. Fused SGD cannot have momentum buffers for some tensors and not for others.
            fused = _on_cuda(carriers)
            return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8 if eps is None else eps, fused=fused)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=0.0, eps=1e-10 if eps is None else eps)
        case "sign_sgd":
            return SignSgd(groups, lr=0.0)
        case _:
            return build_from_bitsandbytes(name, groups, betas=betas, eps=1e-8 if eps is None else eps)


class DenseRule:
    """Clips the gradient's Euclidean norm, then lets a `torch.optim` rule do the arithmetic, in float32 at least.

    A projected gradient is first materialised in `.grad`: rules with state need it whole. Tensors that its directions
    do not reach get no gradient: the rule passes them over, with their decay and their state.
    """

    def __init__(
        self,
        carriers: Carriers,
        directions: Directions | None,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None,
    ) -> None:
        self._carriers = carriers
        self._parameters = carriers.parameters
        self._directions = directions
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm

    def apply(self, estimate: Estimate, *, learning_rate: float, step: int) -> Mapping[str, Tensor | float | None]:
        """One update; drops the gradients afterwards.

        Raises:
            DivergenceError: the gradient is not finite; nothing was changed.
        """
        if (projected := estimate.projected) is not None:
            self._materialise(projected)
        norm = self._norm([tensor.grad for tensor in self._parameters.tensors if tensor.grad is not None])
        if not torch.isfinite(norm):
            raise DivergenceError(f"step {step + 1}: the gradient's norm is {norm:g}; the update was not made")
        if self._max_grad_norm is not None:
            clip_grads_with_norm_(self._parameters.tensors, self._max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._carriers.step(self._optimizer, step=step)
        self._parameters.clear_gradients()
        return {"grad_norm": norm}

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Euclidean norm over all gradients, summed in float32 or wider."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return (
            self._parameters.total(norm.double().square()).sqrt().to(norm.dtype) if self._parameters.sharded else norm
        )

    def _materialise(self, projected: ProjectedGradient) -> None:
        """`.grad <- sum_j c_j z_j`, where the directions reach."""
        assert self._directions is not None
        self._parameters.clear_gradients()
        gradients = dense_sum(self._directions, self._parameters, projected.coefficients, projected.keys)
        for index, gradient in gradients.items():
            self._parameters.tensors[index].grad = gradient

    def state_dict(self) -> StateDict:
        """The rule's tensors and numbers, and master weights, by parameter name."""
        masters = self._carriers.state_dict()
        state: StateDict = {}
        for index, (name, tensor) in enumerate(zip(self._parameters.names, self._carriers.tensors, strict=True)):
            moments = {
                key: self._parameters.saved(index, value) if _is_like(tensor, value) else value
                for key, value in self._optimizer.state.get(tensor, {}).items()
            }
            if held := {**moments, **masters.get(name, {})}:
                state[name] = held
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`; each tensor goes where torch keeps it.

        Raises:
            ValueError: it holds tensors of a parameter that is not trained.
        """
        if unknown := sorted(state.keys() - set(self._parameters.names)):
            raise ValueError(f"{unknown[0]} is no trained parameter")
        self._carriers.load_state_dict(state)
        for index, (name, tensor) in enumerate(zip(self._parameters.names, self._carriers.tensors, strict=True)):
            held = {key: value for key, value in state.get(name, {}).items() if key != MASTER}
            if held and is_from_bitsandbytes(self._optimizer):
                fill_buffers(self._optimizer, tensor, held)
            elif held:
                fused = self._optimizer.defaults.get("fused")  # else torch counts the steps on the host
                self._optimizer.state[tensor] = {
                    key: self._parameters.own(index, value).to("cpu" if key == "step" and not fused else tensor.device)
                    for key, value in held.items()
                }


def _is_like(tensor: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape


def _on_cuda(carriers: Carriers) -> bool:
    return carriers.parameters.device.type == "cuda"
