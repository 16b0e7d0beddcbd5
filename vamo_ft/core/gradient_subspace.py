"""Directions that the gradients of earlier steps point to.

Shapes: k directions, d trainable parameters.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vamo_ft.core.frequent_directions import FrequentDirections, inner_products
from vamo_ft.core.hashing import HashKey, random_bits
from vamo_ft.core.offload import Shelf
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import StateDict
from vamo_ft.core.rounding import stochastically_rounded
from vamo_ft.core.second_moment import SecondMoment

__all__ = ["GradientSubspace"]

_CHUNK = 1 << 20  # elements that are displaced at one time


class GradientSubspace:
    """An orthonormal basis of recent gradients (implements `core.protocols.Directions`).

    In high dimension random directions hold next to nothing of the noise of a mini-batch, q of d parts; the leading
    directions of earlier gradients hold much more. They are read from a sketch (`FrequentDirections`) of what `observe`
    is given and stay as they are from one `freeze` to the next, while the sketch goes on. A key's probe number is the
    number of the basis vector.

    Directions have norm 1, where hashed ones have norm sqrt(d): the size of a perturbation is a *radius*, the distance
    moved, and no `eps` per coordinate.

    Args:
        size: k.
        warmup: gradients to see before the first basis is read; k + 1 or more.
        offload: keep sketch, mean and basis in host memory.
    """

    rowwise = False

    def __init__(self, parameters: TrainableParameters, *, size: int, warmup: int, offload: bool = False) -> None:
        assert warmup > size, "k directions take k centred gradients, the first of which is the mean"
        self._parameters = parameters
        self._sketch = FrequentDirections(parameters, size=size, offload=offload)
        self._size, self.warmup = size, warmup
        # (k, ...) for each parameter; empty before the first freeze
        self._basis = Shelf(device=parameters.device, offload=offload)
        self._gram = torch.empty(0)

    @staticmethod
    def state_bytes(numel: int, size: int) -> int:
        """Memory of sketch, mean and basis: `4 d (3k + 1)` bytes."""
        return 4 * numel * (3 * size + 1)

    @property
    def numel(self) -> int:
        """d, the number of elements of a direction."""
        return self._parameters.numel

    @property
    def ready(self) -> bool:
        """Whether enough gradients were seen to read a basis."""
        return self._sketch.seen >= self.warmup

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Takes in a gradient; the basis stays."""
        self._sketch.insert(gradients)

    def freeze(self, *, share: Callable[[Sequence[Tensor]], None] = lambda basis: None) -> None:
        """Reads a new basis from the sketch; the old one makes room first.

        Args:
            share: gives all processes the main one's basis, in place, should decompositions differ in a bit; called
                with a tensor at a time.
        """
        self._basis = self._basis.like(())
        basis = self._sketch.leading(self._size)
        for place, each in enumerate(basis):
            share([each])
            basis[place] = each
        self._keep(basis)

    def support(self, keys: Sequence[HashKey]) -> tuple[int, ...]:
        """The tensors that the directions reach: all of them."""
        return tuple(range(len(self._parameters.tensors)))

    @torch.no_grad()
    def axpy_(
        self,
        tensors: Sequence[Tensor],
        coefficients: Tensor,
        keys: Sequence[HashKey],
        *,
        scales: Sequence[float] | None = None,
        rounding: HashKey | None = None,
        sources: Sequence[Tensor] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        """`p <- scale * source + sum_j a_j z_j`, the sum formed in float32 (float64 for float64 tensors)."""
        sources = tensors if sources is None else sources
        indices = range(len(tensors)) if indices is None else indices
        weights = coefficients.new_zeros(self._size)
        for coefficient, key in zip(coefficients, keys, strict=True):
            weights[key.probe] += coefficient
        for place, index in enumerate(indices):
            tensor, scale = tensors[place], 1.0 if scales is None else scales[place]
            source, basis = sources[place].reshape(-1), self._basis[index].flatten(1)
            wide = torch.promote_types(tensor.dtype, torch.float32)
            moved = torch.empty_like(source)
            for first in range(0, len(source), _CHUNK):
                part = slice(first, min(first + _CHUNK, len(source)))
                with torch.autocast(source.device.type, enabled=False):  # forward passes displace their layers in it
                    values = source[part].to(wide) * scale + weights.to(wide) @ basis[:, part].to(wide)
                if rounding is not None and tensor.element_size() < 4:
                    offset = self._parameters.offsets[index]
                    bits = random_bits(rounding, offset + part.start, offset + part.stop, device=values.device)
                    values = stochastically_rounded(values, bits, tensor.dtype)
                moved[part] = values
            tensor.copy_(moved.view(tensor.shape))

    def displaced_rows(
        self,
        values: Tensor,
        rows: Tensor,
        *,
        index: int,
        coefficients: Tensor,
        keys: Sequence[HashKey],
        rounding: HashKey | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Not asked for: `rowwise` is False."""
        raise AssertionError("a matrix is displaced as a whole")

    @torch.no_grad()
    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        """(m,) float64 inner products `<tensors, z_j>`; None stands for zeros.

        Collective where the parameters are shared out over processes.
        """
        given = [(index, tensor) for index, tensor in enumerate(tensors) if tensor is not None]
        basis = self._basis.part(index for index, _ in given)
        products = self._parameters.total(inner_products(basis, [tensor.unsqueeze(0) for _, tensor in given]))
        return torch.stack([products[key.probe, 0] for key in keys])

    def gram(self, keys: Sequence[HashKey]) -> Tensor:
        """(m, m) float64, `G_jk = <z_j, z_k>`: the identity, to rounding."""
        rows = [key.probe for key in keys]
        return self._gram[rows][:, rows]

    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        """The projector on the directions (see `SecondMoment`)."""
        held = float(self.gram(keys).diagonal().sum())
        return SecondMoment.identity_on(round(held), self.dots(gradients, keys).square().sum(), gradients)

    def state_dict(self) -> StateDict:
        """The sketch and the present basis."""
        basis = self._parameters.saved_all(self._basis.state(), leading=1)
        return {"sketch": self._sketch.state_dict(), "basis": basis}

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        self._sketch.load_state_dict(state["sketch"])
        if state["basis"]:
            self._keep(self._basis.like(self._parameters.own_all(state["basis"], leading=1)))

    def _keep(self, basis: Shelf) -> None:
        self._basis = basis
        self._gram = self._parameters.total(inner_products(basis, basis))
