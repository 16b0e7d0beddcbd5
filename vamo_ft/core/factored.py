"""Directions whose matrices are products of two thin factors (LOZO, SubZero)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import BLOCK, Domain, HashKey
from vamo_ft.core.kernels import displace_
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rows import row_positions
from vamo_ft.core.second_moment import SecondMoment, squared_norm

__all__ = ["FactoredDirections", "LowRankDirections", "SubspaceDirections"]

_CHUNK = 1 << 22  # elements of a product that exist at one time
_DRAWN = 1 << 20  # elements of factors that are drawn at one time

Made = TypeVar("Made")
Factors = dict[int, tuple[Tensor, Tensor]]
"""Number of a matrix -> A (m, r) and B (n, r), float32."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A parameter with two or more dimensions, seen as (m, n), and the rank of its directions."""

    m: int
    n: int
    rank: int


class _Role(IntEnum):
    """What a stream of random elements becomes."""

    LEFT = 0
    RIGHT = 1
    CORE = 2


class FactoredDirections(ABC):
    """For each matrix `Z = A B^T`, A (m, r) and B (n, r); biases and norms get a plain hashed direction.

    Unit RMS per coordinate holds over the draw of the factors. Of more than two dimensions, as in stacked experts, all
    but the last are flattened to one; `r` is at most the smaller of m and n. Products are formed in chunks of rows and
    never as a whole, and rounded with the same random bits as a plain direction's (implements
    `core.protocols.Directions`).

    Args:
        rank: r.
        refresh_every: steps for which the slow factors are kept.
        distribution: law of the elements of vectors and of the factors that are drawn in every step.
    """

    rowwise = False

    def __init__(
        self,
        parameters: TrainableParameters,
        *,
        rank: int,
        refresh_every: int,
        distribution: Literal["rademacher", "gaussian"] = "gaussian",
        compile_kernels: bool | None = None,
    ) -> None:
        self._parameters = parameters
        self._refresh_every = refresh_every
        self._compile_kernels = compile_kernels
        self._plain = HashedDirections(parameters, distribution=distribution, compile_kernels=compile_kernels)
        self._matrices: dict[int, _Matrix] = {}
        for index, tensor in enumerate(parameters.tensors):
            if tensor.ndim >= 2:
                m, n = tensor.numel() // tensor.shape[-1], tensor.shape[-1]
                self._matrices[index] = _Matrix(m, n, min(m, n, rank))
        self._vectors = [index for index in range(len(parameters.tensors)) if index not in self._matrices]
        self._factors_of_step: _Recent[Factors] = _Recent()

    @abstractmethod
    def _factors(self, key: HashKey) -> Factors:
        """The factors of every matrix."""

    @abstractmethod
    def _spectra(self, gradients: Mapping[int, Tensor], key: HashKey) -> list[tuple[float, float, Tensor]]:
        """`tr P`, `|P|_2` and `g^T P g` of each matrix, with (m, n) float64 gradients by its number."""

    @property
    def numel(self) -> int:
        """d, the number of elements of a direction."""
        return self._parameters.numel

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
        """As `HashedDirections.axpy_`."""
        sources = tensors if sources is None else sources
        indices = range(len(tensors)) if indices is None else indices
        if vectors := [place for place, index in enumerate(indices) if index not in self._matrices]:
            self._plain.axpy_(
                [tensors[place] for place in vectors],
                coefficients,
                keys,
                scales=None if scales is None else [scales[place] for place in vectors],
                rounding=rounding,
                sources=[sources[place] for place in vectors],
                indices=[indices[place] for place in vectors],
            )
        for place, index in enumerate(indices):
            if index in self._matrices:
                scale = None if scales is None else scales[place]
                self._displace(tensors[place], sources[place], index, coefficients, keys, scale, rounding)

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
        """Not offered: a product's last bits depend on how many rows are formed together."""
        raise NotImplementedError

    @torch.no_grad()
    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        """(m,) float64 inner products `<tensors, z_j>`, for a matrix `<G, A B^T> = sum((G B) * A)`."""
        result = self._plain.dots(
            [None if index in self._matrices else tensor for index, tensor in enumerate(tensors)], keys
        )
        with self._full_precision():
            for index, matrix in self._matrices.items():
                if (tensor := tensors[index]) is None:
                    continue
                gradient = tensor.reshape(matrix.m, matrix.n)
                factors = [self._made(key)[index] for key in keys]
                for rows in _row_chunks(matrix):
                    part = gradient[rows].double()
                    result += torch.stack([((part @ b.double()) * a[rows].double()).sum() for a, b in factors])
        return result

    @torch.no_grad()
    def gram(self, keys: Sequence[HashKey]) -> Tensor:
        """(m, m) float64, `G_jk = <z_j, z_k>`, for a matrix `sum((A_j^T A_k) * (B_j^T B_k))`."""
        gram = self._plain.gram(keys, indices=self._vectors)
        with self._full_precision():
            for index, matrix in self._matrices.items():
                factors = [self._made(key)[index] for key in keys]
                a, b = (torch.cat(side, dim=1).double() for side in zip(*factors, strict=True))
                products = (a.T @ a) * (b.T @ b)  # (m r, m r)
                gram += products.view(len(keys), matrix.rank, len(keys), matrix.rank).sum((1, 3))
        return gram

    @torch.no_grad()
    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        """With the factors fixed that are kept for `refresh_every` steps (see `SecondMoment`); of the first key."""
        matrices = {
            index: (torch.zeros_like(self._parameters.tensors[index]) if (g := gradients[index]) is None else g)
            .double()
            .reshape(matrix.m, matrix.n)
            for index, matrix in self._matrices.items()
        }
        with self._full_precision():
            spectra = self._spectra(matrices, keys[0])
        traces, norms, quadratics = (list(column) for column in zip(*spectra, strict=True)) if spectra else ([], [], [])
        if self._vectors:
            traces.append(sum(self._parameters.tensors[index].numel() for index in self._vectors))
            norms.append(1.0)
            quadratics.append(squared_norm(gradients[index] for index in self._vectors))
        quadratic = float(torch.stack(quadratics).sum())
        return SecondMoment(sum(traces), max(norms), quadratic, float(squared_norm(gradients)))

    def _displace(
        self,
        tensor: Tensor,
        source: Tensor,
        index: int,
        coefficients: Tensor,
        keys: Sequence[HashKey],
        scale: float | None,
        rounding: HashKey | None,
    ) -> None:
        """One matrix; rows of the matrix are rows of the kernel, cut where they are very long."""
        matrix, device = self._matrices[index], self._parameters.device
        wide = torch.promote_types(tensor.dtype, torch.float32)
        factors = [self._made(key)[index] for key in keys]
        left = torch.cat([a.to(wide) * c for (a, _), c in zip(factors, coefficients.to(wide), strict=True)], dim=1)
        right = torch.cat([b.to(wide) for _, b in factors], dim=1)
        out = tensor.detach().reshape(matrix.m, matrix.n)
        origin = None if source is tensor else source.detach().reshape(matrix.m, matrix.n)
        for first in range(0, matrix.n, BLOCK):  # one round, unless rows are very long
            columns = slice(first, min(first + BLOCK, matrix.n))
            for rows in _row_chunks(matrix):
                numbers = torch.arange(rows.start, rows.stop, device=device)
                offsets = numbers * matrix.n + (self._parameters.offsets[index] + first)
                blocks, starts = row_positions(offsets, device=device)
                with self._full_precision():
                    product = left[rows] @ right[columns].T
                self._plain.kernel(displace_, product)(
                    out[rows, columns],
                    None if origin is None else origin[rows, columns],
                    product,
                    starts,
                    [],
                    coefficients[:0].to(wide),
                    gaussian=False,
                    scale=None if scale is None else torch.full_like(starts, scale, dtype=torch.float64),
                    rounding=None if rounding is None else self._plain.words(rounding)[blocks],
                )
        if out.data_ptr() != tensor.data_ptr():
            tensor.copy_(out.view(tensor.shape))

    def _made(self, key: HashKey) -> Factors:
        return self._factors_of_step.get(key, lambda: self._factors(key))

    def _draw(
        self, source: HashedDirections, key: HashKey, *, step: int, role: _Role, sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Unit-variance random matrices of the given sizes, float32."""
        stream = HashKey(key.seed, Domain.FACTOR, step, len(_Role) * key.probe + role)
        ends = list(accumulate((rows * columns for rows, columns in sizes), initial=0))
        flat = torch.empty(ends[-1], device=self._parameters.device)
        for start in range(0, len(flat), _DRAWN):
            stop = min(start + _DRAWN, len(flat))
            flat[start:stop] = source.values(stream, start, stop)
        return [flat[start:stop].view(size) for (start, stop), size in zip(pairwise(ends), sizes, strict=True)]

    def _full_precision(self) -> torch.autocast:
        """Forward passes displace their layers, and run in autocast."""
        return torch.autocast(self._parameters.device.type, enabled=False)


class LowRankDirections(FactoredDirections):
    """`Z = U V^T / sqrt(r)`: U is drawn in every step, V every `refresh_every` steps.

    LOZO's eps is ours / sqrt(r).

    Source: LOZO, arXiv 2410.07698, Algorithm 1 (`refresh_every` is the paper's nu).
    """

    def _spectra(self, gradients: Mapping[int, Tensor], key: HashKey) -> list[tuple[float, float, Tensor]]:
        result = []
        for index, (_, right) in self._made(key).items():
            v, matrix = right.double(), self._matrices[index]
            trace, largest = matrix.m * float(v.square().sum()), float(torch.linalg.matrix_norm(v, 2)) ** 2
            quadratic = (gradients[index] @ v).square().sum()
            result.append((trace / matrix.rank, largest / matrix.rank, quadratic / matrix.rank))
        return result

    def _factors(self, key: HashKey) -> Factors:
        matrices = self._matrices.values()
        epoch = key.step // self._refresh_every
        left = self._draw(self._plain, key, step=key.step, role=_Role.LEFT, sizes=[(x.m, x.rank) for x in matrices])
        right = self._draw(self._plain, key, step=epoch, role=_Role.RIGHT, sizes=[(x.n, x.rank) for x in matrices])
        scaled = [u / math.sqrt(x.rank) for u, x in zip(left, matrices, strict=True)]
        return dict(zip(self._matrices, zip(scaled, right, strict=True), strict=True))


class SubspaceDirections(FactoredDirections):
    """`Z = U S V^T sqrt(m n) / r`: S (r, r) is drawn in every step; U and V have orthonormal columns and are kept for
    `refresh_every` steps.

    Source: SubZero, arXiv 2410.08989, Algorithm 1 (`refresh_every` is the paper's T0, S its Z).
    """

    @cached_property
    def _normal(self) -> HashedDirections:
        """What U and V are drawn from."""
        return HashedDirections(self._parameters, distribution="gaussian", compile_kernels=self._compile_kernels)

    @cached_property
    def _bases(self) -> "_Recent[tuple[list[Tensor], list[Tensor]]]":
        return _Recent()

    def _spectra(self, gradients: Mapping[int, Tensor], key: HashKey) -> list[tuple[float, float, Tensor]]:
        left, right = self._kept_bases(key)
        return [
            (
                x.m * x.n,
                (scale := x.m * x.n / x.rank**2),
                scale * (u.double().T @ gradients[index] @ v.double()).square().sum(),
            )
            for (index, x), u, v in zip(self._matrices.items(), left, right, strict=True)
        ]

    def _factors(self, key: HashKey) -> Factors:
        matrices = self._matrices.values()
        left, right = self._kept_bases(key)
        cores = self._draw(self._plain, key, step=key.step, role=_Role.CORE, sizes=[(x.rank, x.rank) for x in matrices])
        with self._full_precision():
            scaled = [
                u @ core * (math.sqrt(x.m * x.n) / x.rank) for u, core, x in zip(left, cores, matrices, strict=True)
            ]
        return dict(zip(self._matrices, zip(scaled, right, strict=True), strict=True))

    def _kept_bases(self, key: HashKey) -> tuple[list[Tensor], list[Tensor]]:
        return self._bases.get(key._replace(step=key.step // self._refresh_every), lambda: self._drawn_bases(key))

    def _drawn_bases(self, key: HashKey) -> tuple[list[Tensor], list[Tensor]]:
        matrices = self._matrices.values()
        epoch = key.step // self._refresh_every
        left = self._draw(self._normal, key, step=epoch, role=_Role.LEFT, sizes=[(x.m, x.rank) for x in matrices])
        right = self._draw(self._normal, key, step=epoch, role=_Role.RIGHT, sizes=[(x.n, x.rank) for x in matrices])
        with self._full_precision():
            return [_orthonormal(each) for each in left], [_orthonormal(each) for each in right]


class _Recent(Generic[Made]):
    """Results by key, for the keys of one step at a time."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._results: dict[HashKey, Made] = {}

    def get(self, key: HashKey, make: Callable[[], Made]) -> Made:
        """The result of `key`, made where it is not there."""
        if key.step != self._step:
            self._step = key.step
            self._results.clear()
        if key not in self._results:
            self._results[key] = make()
        return self._results[key]


def _row_chunks(matrix: _Matrix) -> Iterator[slice]:
    """Rows that are formed together; they depend on nothing but the shape."""
    step = max(1, _CHUNK // matrix.n)
    for first in range(0, matrix.m, step):
        yield slice(first, min(first + step, matrix.m))


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, (n, r) float32; the one whose R has a positive diagonal."""
    basis, triangle = torch.linalg.qr(columns.double())
    result: Tensor = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return result.to(columns.dtype)
