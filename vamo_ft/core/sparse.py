"""Directions on the small weights only (Sparse-MeZO)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vamo_ft.core.directions import Distribution, HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import Segment, TrainableParameters
from vamo_ft.core.protocols import StateDict
from vamo_ft.core.second_moment import SecondMoment, squared_norm

__all__ = ["SparseDirections"]


class SparseDirections(HashedDirections):
    """`z_i` where `|x_i| <= threshold` and 0 elsewhere, with one threshold for each tensor.

    The thresholds are a quantile of the magnitudes at the start of the run, and then fixed. The mask follows the
    weights: it is that of the values that are displaced, the `sources` of `axpy_` or, in place, the tensors themselves
    (so a gradient is formed with the parameters as sources, at scale 0).

    Args:
        quantile: share of each tensor's elements that is displaced at the start.

    Raises:
        UsageError: the elements of a tensor all have one magnitude, so that none is smaller than others.

    Source: Sparse-MeZO, arXiv 2402.15751.
    """

    def __init__(
        self,
        parameters: TrainableParameters,
        *,
        quantile: float,
        distribution: Distribution = "rademacher",
        compile_kernels: bool | None = None,
    ) -> None:
        assert distribution != "sphere", "the norm of a sparse direction changes with the weights"
        super().__init__(parameters, distribution=distribution, compile_kernels=compile_kernels)
        named = zip(parameters.names, parameters.tensors, strict=True)
        self._thresholds = torch.stack([_threshold(name, tensor, quantile) for name, tensor in named])  # (tensors,)
        self._chosen: dict[tuple[int, ...], Tensor] = {}  # thresholds of a launch: picking them would synchronise

    @torch.no_grad()
    def values(self, key: HashKey, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the direction at the parameters' present values, (stop - start,) float32."""
        values = super().values(key, start, stop)
        for segment in self._parameters.segments(start, stop):
            position = segment.offset - start
            values[position:][: segment.stop - segment.start] *= self._mask(segment)
        return values

    @torch.no_grad()
    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        """The identity on the mask at the parameters' present values (see `SecondMoment`)."""
        inside = torch.zeros((), dtype=torch.float64, device=self._parameters.device)
        for segment in self._parameters.segments(0, self.numel):
            if (gradient := gradients[segment.index]) is not None:
                inside += squared_norm([gradient.reshape(-1)[self._mask(segment)]])
        numel = self.reached(range(len(self._parameters.tensors)))
        return SecondMoment.identity_on(numel, inside, gradients)

    def state_dict(self) -> StateDict:
        """The thresholds."""
        return {"thresholds": self._thresholds}

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        self._thresholds = state["thresholds"].to(self._parameters.device)
        self._chosen.clear()

    def _thresholds_of(self, indices: Sequence[int]) -> Tensor:
        chosen = tuple(indices)
        if chosen not in self._chosen:
            self._chosen[chosen] = torch.stack([self._thresholds[index] for index in chosen]).unsqueeze(1)
        return self._chosen[chosen]

    def reached(self, indices: Sequence[int]) -> int:
        """The number of elements of these tensors that are displaced at the parameters' present values."""
        chunks = self._chunks(indices)
        segments = (segment for chunk in chunks for segment in self._parameters.segments(*chunk))
        return sum(int(self._mask(segment).sum()) for segment in segments)

    def _mask(self, segment: Segment) -> Tensor:
        """(stop - start,) bool, which elements are displaced."""
        values = self._parameters.tensors[segment.index].detach().reshape(-1)[segment.start : segment.stop]
        return values.abs() <= self._thresholds[segment.index].to(values.dtype)


def _threshold(name: str, tensor: Tensor, quantile: float) -> Tensor:
    """() float64, the magnitude below which the share `quantile` of the elements lies."""
    magnitudes = tensor.detach().reshape(-1).abs()
    smallest, largest = magnitudes.aminmax()
    if smallest == largest:
        raise UsageError(
            f"method.directions.structure: sparse takes the smaller weights of each tensor, and all of {name} have the "
            f"magnitude {float(smallest):g}; leave it out with model.freeze, or write another structure"
        )
    rank = 1 + int(quantile * (len(magnitudes) - 1))
    return magnitudes.kthvalue(rank).values.double()
