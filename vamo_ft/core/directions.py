"""Perturbation directions by hashing.

A direction `z` has unit RMS per coordinate: `|z|` is sqrt(d), or about it. It is never stored: every operation makes
it anew, in one pass over memory for any number of directions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from vamo_ft.core.hashing import BLOCK, HashKey, block_words
from vamo_ft.core.kernels import accumulate_, compiled, displace_, row_words, worth_compiling
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rows import Launch, RowPlan, row_positions
from vamo_ft.core.second_moment import SecondMoment, squared_norm
from vamo_ft.core.transfer import to_device

__all__ = ["Distribution", "HashedDirections"]

Distribution = Literal["rademacher", "gaussian", "sphere"]

_CHUNK = 1 << 20  # elements whose intermediate results exist at one time
_FUSED = 2  # directions that one kernel adds up; more take long to compile and gain little
_MOST_KEYS = 16  # keys whose words are kept: 32 bytes for 65,536 elements each
_MOST_SCALES = 4096  # keys whose norm is kept: one number each, and a pass over memory to find it


class HashedDirections:
    """Directions over every trainable parameter (implements `core.protocols.Directions`).

    | distribution | construction |
    |---|---|
    | rademacher | the top bit as a sign; lies exactly on the sphere of radius sqrt(d) (Spall 1992) |
    | gaussian | Box-Muller on two hashed uniforms (MeZO, arXiv 2305.17333) |
    | sphere | gaussian rescaled to norm sqrt(d) (ZO-SVRG, VAMO) |

    Args:
        compile_kernels: through `torch.compile`, with the same bits; None: where a compiler exists and there are four
            million elements or more.
    """

    rowwise = True

    def __init__(
        self,
        parameters: TrainableParameters,
        *,
        distribution: Distribution = "rademacher",
        compile_kernels: bool | None = None,
    ) -> None:
        self._parameters = parameters
        self._distribution = distribution
        if compile_kernels is None:
            compile_kernels = worth_compiling(parameters.numel, parameters.device.type)
        self._compile = compile_kernels
        self._plans: dict[tuple[object, ...], RowPlan] = {}
        self._words: dict[HashKey, Tensor] = {}
        self._sphere_scales: dict[HashKey, Tensor] = {}

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
        """`p <- scale * source + sum_j a_j z_j`, in one pass over memory.

        The sum over j is formed in float32 (float64 for float64 tensors) in the order of `keys`, then added.

        Args:
            tensors: written to, of the parameters' shapes.
            coefficients: (m,) the a_j.
            keys: the m directions.
            scales: one for each tensor, multiplies the source; None stands for ones.
            rounding: stream for stochastic rounding of bfloat16 and float16 results; None rounds to nearest.
            sources: what is displaced; None: the tensors' own values.
            indices: the parameters that the tensors stand for; None: all of them.
        """
        sources = tensors if sources is None else sources
        indices = range(len(tensors)) if indices is None else indices
        plan = self._plan(tensors, indices)
        coefficients = self._scaled(coefficients, keys)
        words = [self.words(key)[plan.blocks] for key in keys]
        noise = None if rounding is None else self.words(rounding)[plan.blocks]
        factors = None if scales is None else plan.by_row(scales)
        for launch in plan.launches:
            threshold = self._thresholds_of([indices[place] for place in launch.places])
            with _rows(launch, tensors, sources) as (out, source):
                self._displace(
                    out,
                    source,
                    plan.starts[launch.rows],
                    [each[launch.rows] for each in words],
                    coefficients,
                    scale=None if factors is None else factors[launch.rows],
                    threshold=None if threshold is None else threshold.expand(launch.shape[0], 1),
                    rounding=None if noise is None else noise[launch.rows],
                )

    @torch.no_grad()
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
        """`values + sum_j a_j z_j` for some rows of a matrix.

        Args:
            values: (R, H) the rows' values.
            rows: (R,) int64, their numbers in parameter `index`, with repetitions or not.
            out: (R, H) contiguous, is written to; None: a new tensor.

        Returns:
            (R, H), as `axpy_` would give, bit for bit.
        """
        out = torch.empty_like(values) if out is None else _stretch(out, 0, (len(values), values.shape[1]))
        width = values.shape[1]
        threshold = self._thresholds_of([index])
        for first in range(0, width, BLOCK):  # one round, unless rows are very long
            part = slice(first, min(first + BLOCK, width))
            offsets = rows * width + (self._parameters.offsets[index] + first)
            blocks, starts = row_positions(offsets, device=values.device)
            self._displace(
                out[:, part],
                values[:, part],
                starts,
                [self.words(key)[blocks] for key in keys],
                self._scaled(coefficients, keys),
                scale=None,
                threshold=None if threshold is None else threshold.expand(len(rows), 1),
                rounding=None if rounding is None else self.words(rounding)[blocks],
            )
        return out

    @torch.no_grad()
    def values(self, key: HashKey, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the direction, (stop - start,) float32."""
        device = self._parameters.device
        first, position = divmod(start, BLOCK)
        rows = -(-(stop - start) // BLOCK)
        total = torch.zeros(rows, min(stop - start, BLOCK), device=device)
        words = to_device(row_words(block_words(key, first, first + rows + 1)), device)
        starts = torch.full((rows, 1), position, dtype=torch.int32, device=device)
        one = self._scaled(torch.ones(1, device=device), [key])
        self._accumulate(total, starts, [words], _in_rows(one, total))
        return total.view(-1)[: stop - start]

    @torch.no_grad()
    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        """(m,) float64 inner products `<tensors, z_j>`, in one pass; None stands for zeros and costs nothing.

        Collective where the parameters are shared out over processes.
        """
        result = torch.zeros(len(keys), dtype=torch.float64, device=self._parameters.device)
        for start, stop in self._held([index for index, tensor in enumerate(tensors) if tensor is not None]):
            directions = [self.values(key, start, stop) for key in keys]
            for segment in self._parameters.segments(start, stop):
                tensor = tensors[segment.index]
                assert tensor is not None
                values = tensor.reshape(-1)[segment.start : segment.stop].double()
                position = segment.offset - start
                result += torch.stack([_sum(values * z[position : position + values.numel()]) for z in directions])
        return self._parameters.total(result)

    @torch.no_grad()
    def gram(self, keys: Sequence[HashKey], *, indices: Sequence[int] | None = None) -> Tensor:
        """(m, m) float64, `G_jk = <z_j, z_k>`, in one pass; the diagonal is d except for gaussian directions.

        Args:
            indices: the parameters over which the products are taken; None: all of them.
        """
        indices = range(len(self._parameters.tensors)) if indices is None else indices
        gram = torch.zeros(len(keys), len(keys), dtype=torch.float64, device=self._parameters.device)
        if len(keys) > 1 or self._distribution == "gaussian":
            for start, stop in self._chunks(indices):
                directions = torch.stack([self.values(key, start, stop) for key in keys]).double()
                gram += directions @ directions.T
        if self._distribution != "gaussian":
            gram.fill_diagonal_(self.reached(indices))
        return gram

    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        """The identity, for every distribution (see `SecondMoment`)."""
        return SecondMoment.identity_on(self.numel, squared_norm(gradients), gradients)

    def words(self, key: HashKey) -> Tensor:
        """(B, 8) int32 words of every block of the vector, for a row that begins in it (see `kernels.row_words`)."""
        words = self._words.pop(key, None)
        if words is None:
            if len(self._words) >= _MOST_KEYS:
                del self._words[next(iter(self._words))]  # that used least recently
            words = row_words(block_words(key, 0, -(-self.numel // BLOCK) + 1))
            words = to_device(words, self._parameters.device)
        self._words[key] = words
        return words

    def kernel(self, kernel: Callable[..., None], rows: Tensor) -> Callable[..., None]:
        """The kernel as it is to be called for `rows` (R, W): compiled, or plain."""
        return compiled(kernel) if self._compile and len(rows) > 1 else kernel

    def _thresholds_of(self, indices: Sequence[int]) -> Tensor | None:
        """(len(indices), 1) float64, the largest magnitude of an element that is displaced; None: all are."""
        return None

    def reached(self, indices: Sequence[int]) -> int:
        """The number of elements of these tensors that are displaced."""
        return sum(stop - start for start, stop in (self._parameters.extents[index] for index in indices))

    def _displace(
        self,
        out: Tensor,
        source: Tensor | None,
        starts: Tensor,
        words: Sequence[Tensor],
        coefficients: Tensor,
        *,
        scale: Tensor | None,
        threshold: Tensor | None,
        rounding: Tensor | None,
    ) -> None:
        """One launch, or several where intermediate results would be large."""
        coefficients = _in_rows(coefficients, out)
        kernel = self.kernel(displace_, out)
        whole = kernel is not displace_ and len(words) <= _FUSED
        step = len(out) if whole else max(1, _CHUNK // out.shape[1])
        for first in range(0, len(out), step):
            part = slice(first, first + step)
            target, origin = out[part], None if source is None else source[part]
            carried, fused = None, [each[part] for each in words]
            if len(fused) > _FUSED:
                carried = torch.zeros(fused[0].shape[0], out.shape[1], dtype=coefficients.dtype, device=out.device)
                self._accumulate(carried, starts[part], fused[:-_FUSED], coefficients[part, :-_FUSED])
            kernel(
                target,
                origin,
                carried,
                starts[part],
                fused[-_FUSED:],
                coefficients[part, -_FUSED:],
                gaussian=self._distribution != "rademacher",
                scale=None if scale is None else scale[part],
                reference=None if threshold is None else target if origin is None else origin,
                threshold=None if threshold is None else threshold[part].to(out.dtype),
                rounding=None if rounding is None else rounding[part],
            )

    def _accumulate(self, total: Tensor, starts: Tensor, words: Sequence[Tensor], coefficients: Tensor) -> None:
        kernel = self.kernel(accumulate_, total)
        for first in range(0, len(words), _FUSED):
            part = slice(first, first + _FUSED)
            kernel(total, starts, words[part], coefficients[:, part], gaussian=self._distribution != "rademacher")

    def _chunks(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Stretches of the vector that make up the tensors, neighbouring tensors together."""
        return _cut([self._parameters.extents[index] for index in indices])

    def _held(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Those of them that this process holds."""
        offsets, tensors = self._parameters.offsets, self._parameters.tensors
        return _cut([(offsets[index], offsets[index] + tensors[index].numel()) for index in indices])

    def _plan(self, tensors: Sequence[Tensor], indices: Sequence[int]) -> RowPlan:
        name = (tuple(indices), tuple(tensor.dtype for tensor in tensors))
        if name not in self._plans:
            self._plans[name] = RowPlan.of(tensors, [self._parameters.offsets[index] for index in indices])
        return self._plans[name]

    def _scaled(self, coefficients: Tensor, keys: Sequence[HashKey]) -> Tensor:
        """The coefficients of standard normals or signs."""
        if self._distribution != "sphere":
            return coefficients
        return coefficients * torch.stack([self._sphere_scale(key) for key in keys]).to(coefficients.dtype)

    def _sphere_scale(self, key: HashKey) -> Tensor:
        """() float64, sqrt(d) / norm of the gaussian, the norm summed in float64 chunk by chunk, once per key."""
        if key not in self._sphere_scales:
            if len(self._sphere_scales) >= _MOST_SCALES:
                self._sphere_scales.clear()
            normal = HashedDirections(self._parameters, distribution="gaussian", compile_kernels=self._compile)
            square = torch.zeros((), dtype=torch.float64, device=self._parameters.device)
            for start, stop in self._chunks(range(len(self._parameters.tensors))):
                square += _sum(normal.values(key, start, stop).double().square())
            self._sphere_scales[key] = math.sqrt(self.numel) / square.sqrt()
        return self._sphere_scales[key]


@contextmanager
def _rows(
    launch: Launch, tensors: Sequence[Tensor], sources: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Target and source (None: the same) of a launch, (R, W); what is not one stretch of memory goes through a copy."""
    begin, end = launch.first, launch.first + (launch.shape[0] * launch.shape[1]) // len(launch.places)
    first = launch.places[0]
    if len(launch.places) == 1 and tensors[first].is_contiguous() and sources[first].is_contiguous():
        out = _stretch(tensors[first], begin, launch.shape)
        yield out, None if tensors[first] is sources[first] else _stretch(sources[first], begin, launch.shape)
        return
    staged = torch.stack([sources[place].detach().reshape(-1)[begin:end] for place in launch.places])
    staged = staged.view(launch.shape)
    yield staged, None
    for place, row in zip(launch.places, staged.view(len(launch.places), -1), strict=True):
        target = tensors[place].detach()
        if target.is_contiguous():
            target.view(-1)[begin:end] = row
        else:
            whole = target.reshape(-1)  # a copy
            whole[begin:end] = row
            target.copy_(whole.view(target.shape))


def _in_rows(coefficients: Tensor, like: Tensor) -> Tensor:
    """(m,) -> (R, m), one for each of the R rows of `like`, in the type of its arithmetic."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return coefficients.to(wide).repeat(len(like), 1)


def _stretch(tensor: Tensor, begin: int, shape: tuple[int, int]) -> Tensor:
    """Elements from `begin` on as rows, sharing memory.

    Not by `view`: compiled code that writes to a view is bound to the number of dimensions of what it is a view of.
    """
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset() + begin, shape, (shape[1], 1))


def _cut(stretches: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Pieces of the stretches, neighbouring ones together, whose intermediate results may exist at one time."""
    joined: list[tuple[int, int]] = []
    for start, stop in stretches:
        if joined and joined[-1][1] == start:
            start, _ = joined.pop()
        joined.append((start, stop))
    for start, stop in joined:
        for first in range(start, stop, _CHUNK):
            yield first, min(first + _CHUNK, stop)


def _sum(values: Tensor) -> Tensor:
    """() the sum of (n,) values in an order that does not depend on the number of threads."""
    whole = len(values) // 4096 * 4096
    return values[:whole].view(-1, 4096).sum(1).sum() + values[whole:].sum()
