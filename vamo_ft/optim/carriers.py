"""What a `torch.optim` rule moves: the parameters, or float32 tensors in the place of bfloat16 ones."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rounding import stochastically_rounded

__all__ = ["Carriers", "update_rounding"]

_UPDATE = 0xFFFFFFFF  # probe number of the update's rounding bits; probe points use the small ones
_TOGETHER = 1 << 24  # elements that are float32 at one time, unless a single tensor has more
_CHUNK = 1 << 20  # elements that are rounded at one time


class Carriers:
    """Lets a rule step bfloat16 parameters in float32, and rounds the result stochastically.

    A carrier holds the values and the gradient of its parameter in float32 during the step and nothing between steps,
    so that no second copy of the weights is kept, and updates far below one ulp do not vanish in the mean:
    `E[x'] = rule(x, g)`. The rule's state belongs to the carriers and is float32. Parameters of float32 and float64 are
    their own carriers.

    Attributes:
        parameters: what is trained.
        tensors: one carrier for each parameter, of its shape.
    """

    def __init__(self, parameters: TrainableParameters, *, seed: int) -> None:
        self.parameters = parameters
        self.tensors: tuple[nn.Parameter, ...] = tuple(
            nn.Parameter(_nothing(tensor)) if tensor.element_size() < 4 else tensor for tensor in parameters.tensors
        )
        self._seed = seed

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, *, step: int) -> None:
        """One step of a rule over `tensors`, on the parameters' gradients; may drop them."""
        optimizer.step()  # of those that are their own carriers: the others have no gradient
        low = []
        for index, (carrier, parameter) in enumerate(zip(self.tensors, self.parameters.tensors, strict=True)):
            if carrier is parameter:
                parameter.grad = None  # must not step again below
            elif parameter.grad is not None:
                low.append(index)
        key = update_rounding(self._seed, step)
        for indices in self._together(low):
            for index in indices:
                carrier, parameter = self.tensors[index], self.parameters.tensors[index]
                assert parameter.grad is not None
                carrier.data, carrier.grad = parameter.float(), parameter.grad.float()
            optimizer.step()
            for index in indices:
                carrier, parameter = self.tensors[index], self.parameters.tensors[index]
                _round_into(parameter, carrier, key, offset=self.parameters.offsets[index])
                carrier.data, carrier.grad = _nothing(parameter), None

    @property
    def most_together(self) -> int:
        """Elements whose carriers have memory at one time, at most."""
        low = [tensor.numel() for tensor in self.parameters.tensors if tensor.element_size() < 4]
        return min(sum(low), max([_TOGETHER, *low])) if low else 0

    def _together(self, indices: Sequence[int]) -> Iterator[list[int]]:
        group: list[int] = []
        numel = 0
        for index in indices:
            size = self.parameters.tensors[index].numel()
            if group and numel + size > _TOGETHER:
                yield group
                group, numel = [], 0
            group.append(index)
            numel += size
        if group:
            yield group


def update_rounding(seed: int, step: int) -> HashKey:
    """The stream that rounds the update of a step."""
    return HashKey(seed, Domain.ROUNDING, step, _UPDATE)


def _nothing(like: Tensor) -> Tensor:
    """A float32 tensor of the same shape that takes no memory."""
    return torch.zeros((), dtype=torch.float32, device=like.device).expand(like.shape)


def _round_into(parameter: Tensor, values: Tensor, key: HashKey, *, offset: int) -> None:
    """`parameter <- values`, each element rounded by the bits of its offset in the vector of all parameters."""
    flat = values.reshape(-1)
    rounded = torch.empty(len(flat), dtype=parameter.dtype, device=parameter.device)
    for first in range(0, len(flat), _CHUNK):
        part = flat[first : first + _CHUNK]
        bits = random_bits(key, offset + first, offset + first + len(part), device=part.device)
        rounded[first : first + _CHUNK] = stochastically_rounded(part, bits, parameter.dtype)
    parameter.copy_(rounded.view(parameter.shape))
