"""A stand-in for bitsandbytes without its kernels: the same constructors, the same state, AdamW in plain torch.

Moments of tensors with 4,096 elements and more are indices into a table, times the largest magnitude of each 256. The
buffers of a paged rule are marked, as the library marks those that lie in managed memory.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

BLOCK = 256


class Rule(torch.optim.Optimizer):
    bits, paged = 8, False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.least = min_8bit_size
        self.tables = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)

    def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        assert self.param_groups[gindex] is group and group["params"][pindex] is p
        state = self.state[p]
        state["step"] = 0
        eight = self.bits == 8 and p.numel() >= self.least
        for number, table in enumerate(self.tables, start=1):
            buffer = torch.zeros(p.shape, dtype=torch.uint8 if eight else torch.float32)
            buffer.is_paged = self.paged  # type: ignore[attr-defined]
            state[f"state{number}"] = buffer
            if eight:
                state[f"qmap{number}"] = table  # one for all parameters
                state[f"absmax{number}"] = torch.zeros(-(-p.numel() // BLOCK))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if len(self.state[p]) == 0:
                    self.init_state(group, p, gindex, pindex)
                self._update(group, p, self.state[p])

    def _update(self, group: Any, p: Tensor, state: dict[str, Any]) -> None:
        state["step"] += 1
        moments = []
        for number, (beta, value) in enumerate(zip(group["betas"], (p.grad, p.grad.square()), strict=True), start=1):
            moment = beta * self._read(state, number) + (1 - beta) * value
            self._write(state, number, moment)
            moments.append(moment / (1 - beta ** state["step"]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * moments[0] / (moments[1].sqrt() + group["eps"]))

    def _read(self, state: dict[str, Any], number: int) -> Tensor:
        buffer = state[f"state{number}"]
        if buffer.dtype == torch.float32:
            return buffer
        values = state[f"qmap{number}"][buffer.flatten().long()]
        return (values * self._scales(state, number, buffer)).view(buffer.shape)

    def _write(self, state: dict[str, Any], number: int, moment: Tensor) -> None:
        buffer, table = state[f"state{number}"], self.tables[number - 1]
        if buffer.dtype == torch.float32:
            buffer.copy_(moment)
            return
        padded = torch.zeros(len(state[f"absmax{number}"]) * BLOCK)
        padded[: moment.numel()] = moment.flatten()
        state[f"absmax{number}"].copy_(padded.view(-1, BLOCK).abs().amax(1))
        scaled = moment.flatten() / self._scales(state, number, buffer).clamp(min=1e-30)
        buffer.copy_(torch.bucketize(scaled, table).clamp(max=255).view(buffer.shape))

    @staticmethod
    def _scales(state: dict[str, Any], number: int, buffer: Tensor) -> Tensor:
        return state[f"absmax{number}"].repeat_interleave(BLOCK)[: buffer.numel()]


class AdamW8bit(Rule):
    pass


class PagedAdamW8bit(Rule):
    paged = True


class PagedAdamW32bit(Rule):
    bits, paged = 32, True


def stand_in() -> ModuleType:
    module: Any = ModuleType("bitsandbytes")
    module.optim = SimpleNamespace(AdamW8bit=AdamW8bit, PagedAdamW8bit=PagedAdamW8bit, PagedAdamW32bit=PagedAdamW32bit)
    return module
