"""What an update rule moves: the parameters, or float32 tensors in the place of bfloat16 ones."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import StateDict
from vamo_ft.core.rounding import stochastically_rounded

__all__ = ["MASTER", "Carriers", "has_low_precision", "update_rounding"]

MASTER = "master"
"""The key of a parameter's float32 value in the state of an update rule."""

_UPDATE = 0xFFFFFFFF  # probe number of the update's rounding bits; probe points use the small ones
_TOGETHER = 1 << 24  # elements that are float32 at one time, unless a single tensor has more
_CHUNK = 1 << 20  # elements that are rounded at one time


class Carriers:
    """Lets a rule step bfloat16 parameters in float32.

    A carrier has the values and the gradient of its parameter in float32 during the step. Between steps it either
    holds nothing, so that no second copy of the weights is kept, and the result is rounded stochastically: updates far
    below one ulp do not vanish in the mean, `E[x'] = rule(x, g)`. Or, as master weights (Micikevicius et al. 2018,
    "Mixed Precision Training", arXiv 1710.03740), it keeps its values, 4 bytes an element, and the parameter is their
    nearest rounding: they are what is trained, exactly as a float32 parameter would be on the same gradients, and
    belong to the state of the rule.

    The rule's own state belongs to the carriers and is float32. Parameters of float32 and float64 are their own
    carriers.

    Args:
        seed: of the stochastic rounding.
        master_weights: keep the values; they begin as the parameters' own.

    Attributes:
        parameters: what is trained.
        tensors: one carrier for each parameter, of its shape.
    """

    def __init__(self, parameters: TrainableParameters, *, seed: int, master_weights: bool = False) -> None:
        self.parameters = parameters
        self.tensors: tuple[nn.Parameter, ...] = tuple(
            nn.Parameter(tensor.detach().float() if master_weights else _nothing(tensor)) if _is_low(tensor) else tensor
            for tensor in parameters.tensors
        )
        self._seed = seed
        self._masters = master_weights

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
                if not self._masters:
                    carrier.data = parameter.float()
                carrier.grad = parameter.grad.float()
            optimizer.step()
            for index in indices:
                carrier, parameter = self.tensors[index], self.parameters.tensors[index]
                carrier.grad = None
                if not self._masters:
                    _round_into(parameter, carrier, key, offset=self.parameters.offsets[index])
                    carrier.data = _nothing(parameter)
            if self._masters:
                self.round(indices)

    @torch.no_grad()
    def round(self, indices: Iterable[int]) -> None:
        """Makes these parameters the nearest rounding of their master weights."""
        for index in indices:
            carrier, parameter = self.tensors[index], self.parameters.tensors[index]
            if carrier is not parameter:
                parameter.copy_(carrier)

    @property
    def most_together(self) -> int:
        """Elements whose carriers have memory of a step's own at one time, at most."""
        low = [tensor.numel() for tensor in self.parameters.tensors if _is_low(tensor)]
        return min(sum(low), max([_TOGETHER, *low])) if low else 0

    def state_dict(self) -> StateDict:
        """The master weights: name -> {"master": values}; empty where nothing is kept."""
        saved = self.parameters.saved
        return {name: {MASTER: saved(index, master.detach())} for index, name, master in self._numbered_masters()}

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        """Restores what of `state_dict` there is; other master weights stay the parameters' own values."""
        for index, name, master in self._numbered_masters():
            if MASTER in state.get(name, {}):
                master.copy_(self.parameters.own(index, state[name][MASTER]))

    def _numbered_masters(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        named = zip(self.parameters.names, self.tensors, self.parameters.tensors, strict=True)
        for index, (name, carrier, own) in enumerate(named):
            if self._masters and carrier is not own:
                yield index, name, carrier

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


def has_low_precision(parameters: TrainableParameters) -> bool:
    """Whether any of them has fewer bits than float32."""
    return any(_is_low(tensor) for tensor in parameters.tensors)


def update_rounding(seed: int, step: int) -> HashKey:
    """The stream that rounds the update of a step."""
    return HashKey(seed, Domain.ROUNDING, step, _UPDATE)


def _is_low(tensor: Tensor) -> bool:
    return tensor.element_size() < 4


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
