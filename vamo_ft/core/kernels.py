"""The arithmetic of perturbations on rows of elements, one pass over memory, plain or compiled.

The same functions run eagerly and through `torch.compile`. They use additions, multiplications, comparisons and
integer operations only, in a fixed order, so that both give the same bits. On CUDA the compiler is told not to contract
multiplications and additions, for the same reason.

Shapes: R rows, W elements in a row (at most 65,536), m directions. Row r covers W consecutive offsets; `start` (R, 1)
is the position of the first in its block of 65,536, and `words` (R, 8) are the hash words of that block and the next.
"""

import functools
import importlib
import importlib.util
import logging
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from vamo_ft.core.hashing import BLOCK, hashed
from vamo_ft.core.rounding import stochastically_rounded

__all__ = [
    "COMPILER_BYTES",
    "accumulate_",
    "compiled",
    "compiler_available",
    "displace_",
    "load_compiler",
    "row_words",
    "worth_compiling",
]

Arguments = ParamSpec("Arguments")

_log = logging.getLogger("vamo_ft")

COMPILER_BYTES = 80 << 20
"""Main memory that compiling these kernels takes at its highest, measured on the CPU with torch 2.13 and no cache: 78
to 96 MiB alone (`python -m scripts.plan_checks.compiler`), 72 to 84 after the imports of a run. 32 of them are a buffer
with which torch empties the processor's cache to time a function's guards; the rest stays.
"""

_COMPILE_FROM = 1 << 22  # elements; for less, compiling takes longer than it ever saves
_INLINED = 12  # operations; torch's default of 30 takes minutes to compile a hash of many small steps
_CHUNK = 1 << 20  # elements that the plain kernel, which forms intermediate results, is given at one time
_VARIANTS = 64  # far more than the precisions, distributions and numbers of directions of one process


def row_words(words: Tensor) -> Tensor:
    """(B, 4) words of B + 1 consecutive blocks -> (B, 8): for each lane K0, K1 of a block, then of the block after it.

    The later K0 is reduced by 65,536, so that it can be added to a position that has run past the block's end.
    """
    here, after = words[:-1], words[1:] - torch.tensor([BLOCK, 0, BLOCK, 0], dtype=torch.int32)
    return torch.cat([here[:, :2], after[:, :2], here[:, 2:], after[:, 2:]], dim=1)


def displace_(
    out: Tensor,
    source: Tensor | None,
    carried: Tensor | None,
    start: Tensor,
    words: Sequence[Tensor],
    coefficients: Tensor,
    *,
    gaussian: bool,
    scale: Tensor | None = None,
    reference: Tensor | None = None,
    threshold: Tensor | None = None,
    rounding: Tensor | None = None,
) -> None:
    """`out <- scale * source + carried + sum_j a_j z_j`, the sum formed first, in the order of the directions.

    Args:
        out: (R, W).
        source: (R, W), of the same type; None: `out` itself.
        carried: (R, W) a partial sum, or None.
        start: (R, 1) int32.
        words: m tensors (R, 8) int32.
        coefficients: (R, m) the a_j, the same in all rows, in the type of the arithmetic: float32, or float64 for
            float64 elements. One number for all rows would let the compiler run the last operations in a loop of their
            own, with the random bits in memory between the two.
        gaussian: Box-Muller normals in place of signs.
        scale: (R, 1) float64; product and sum are formed in float64.
        reference: (R, W); only elements with `|reference| <= threshold` are displaced.
        threshold: (R, 1), of the reference's type.
        rounding: (R, 8) int32 words of the stream that rounds bfloat16 and float16 stochastically.
    """
    wide = coefficients.dtype
    source = out if source is None else source
    position = _positions(start, out)
    total = _sum(carried, position, words, coefficients, gaussian=gaussian)
    if reference is not None and threshold is not None:
        total = torch.where(reference.abs() <= threshold, total, 0.0)
    if scale is None:
        value = source.to(wide) + total
    else:
        value = (source.to(torch.float64) * scale + total.to(torch.float64)).to(wide)
    if rounding is not None and out.dtype in (torch.bfloat16, torch.float16):
        out.copy_(stochastically_rounded(value, _bits(position, rounding, lane=0), out.dtype))
    else:
        out.copy_(value)


def accumulate_(total: Tensor, start: Tensor, words: Sequence[Tensor], coefficients: Tensor, *, gaussian: bool) -> None:
    """`total <- total + sum_j a_j z_j`, for (R, W) float32 or float64."""
    total.copy_(_sum(total, _positions(start, total), words, coefficients, gaussian=gaussian))


@functools.cache
def compiler_available(device_type: str) -> bool:
    """Whether `torch.compile` can make kernels here: a C++ compiler for the CPU, Triton elsewhere."""
    if device_type == "cpu":
        return shutil.which(shlex.split(os.environ.get("CXX") or "g++")[-1]) is not None
    return importlib.util.find_spec("triton") is not None


def worth_compiling(numel: int, device_type: str) -> bool:
    """Whether directions of so many elements are made by compiled kernels."""
    return numel >= _COMPILE_FROM and compiler_available(device_type)


def load_compiler() -> None:
    """Imports `torch.compile`'s parts, and lets a function have as many compiled forms as anything here can need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while its compiler is imported
        importlib.import_module("torch._inductor.compile_fx")
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)  # for the process: older torch has no other place


@functools.cache
def compiled(kernel: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The kernel through `torch.compile`, for any number and width of rows above one.

    Where the compiler turns out to fail, the plain kernel takes its place, a part of the rows at a time, with a log
    line.
    """
    load_compiler()
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

    options: dict[str, str | int | bool | Callable[..., Any]] = {"realize_opcount_threshold": _INLINED}
    if torch.cuda.is_available():
        options["emulate_precision_casts"] = True  # also keeps Triton from contracting multiplications and additions
    made = torch.compile(kernel, dynamic=True, fullgraph=True, options=options)
    failed = False

    @functools.wraps(kernel)
    def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> None:
        nonlocal failed
        if not failed:
            try:
                made(*arguments, **keywords)
                return
            except (BackendCompilerFailed, FailOnRecompileLimitHit) as error:
                _log.warning("perturbations stay uncompiled: %s", " ".join(str(error).split())[:200])
                failed = True
        target = arguments[0]
        assert isinstance(target, Tensor)
        rows, width = target.shape
        for first in range(0, rows, step := max(1, _CHUNK // width)):
            part = slice(first, first + step)
            kernel(*(_rows(each, part) for each in arguments), **{k: _rows(v, part) for k, v in keywords.items()})

    return call


def _rows(argument: Any, part: slice) -> Any:
    """The rows of a tensor, or of each tensor in a list; what has none is as it is."""
    if isinstance(argument, list):
        return [each[part] for each in argument]
    return argument[part] if isinstance(argument, Tensor) else argument


def _positions(start: Tensor, like: Tensor) -> Tensor:
    return start + torch.arange(like.shape[1], dtype=torch.int32, device=like.device)


def _sum(
    carried: Tensor | None, position: Tensor, words: Sequence[Tensor], coefficients: Tensor, *, gaussian: bool
) -> Tensor:
    total = carried
    for index, row in enumerate(words):
        a = coefficients[:, index : index + 1]
        if gaussian:
            term = a * _standard_normal(position, row).to(coefficients.dtype)
        else:
            term = torch.where(_bits(position, row, lane=0) < 0, -a, a)
        total = term if total is None else total + term
    assert total is not None
    return total


def _bits(position: Tensor, words: Tensor, *, lane: int) -> Tensor:
    k0, k1, next_k0, next_k1 = (words[:, 4 * lane + column : 4 * lane + column + 1] for column in range(4))
    beyond = position >= BLOCK
    return hashed(position, torch.where(beyond, next_k0, k0), torch.where(beyond, next_k1, k1))


def _standard_normal(position: Tensor, words: Tensor) -> Tensor:
    """Box-Muller: `sqrt(-2 ln u) cos(2 pi t)`, u in (0, 1] and t in [0, 1) of 24 bits each; float32.

    Logarithm and cosine are polynomials: library functions differ between eager and compiled code and between vector
    and scalar code. The relative error stays below 6e-7.
    """
    radius, angle = (_bits(position, words, lane=lane) >> 8 & 0xFFFFFF for lane in (0, 1))
    square = -2.0 * _natural_log((radius + 1).to(torch.float32) * 2.0**-24)
    quarter = (angle.to(torch.float32) * 2.0**-24 - 0.5).abs() - 0.25  # exact; cos(2 pi t) = sin(2 pi quarter)
    return _root(square) * _sin_turns(quarter)


def _natural_log(u: Tensor) -> Tensor:
    """Logarithm of u in [2**-24, 1]: `u = 2**e (1 + f)` with 1 + f in [sqrt(1/2), sqrt(2)), a polynomial in f."""
    low = 0x3F3504F3  # the bits of sqrt(1/2)
    bits = u.view(torch.int32) - low
    f = ((bits & 0x7FFFFF) + low).view(torch.float32) - 1.0
    tail = f * _LOG[0] + _LOG[1]
    for coefficient in _LOG[2:]:
        tail = tail * f + coefficient
    return (tail * f * f * f - 0.5 * (f * f) + f) + (bits >> 23).to(torch.float32) * 0.6931471805599453


def _root(x: Tensor) -> Tensor:
    """sqrt(x), correctly rounded: as compiled code has it, and eager code for float64 alone."""
    if torch.compiler.is_compiling():
        return x.sqrt()
    return x.to(torch.float64).sqrt().to(torch.float32)


def _sin_turns(turns: Tensor) -> Tensor:
    """sin(2 pi turns) for |turns| <= 1/4."""
    square = turns * turns
    result = square * _SIN[0] + _SIN[1]
    for coefficient in _SIN[2:]:
        result = result * square + coefficient
    return result * turns


# Least-squares fits at Chebyshev nodes: ln(1 + f) = f - f**2 / 2 + f**3 p(f), and sin(2 pi t) = t p(t**2).
_LOG = (-0.0736286787, 0.126203275, -0.132021042, 0.14227114, -0.166213699, 0.199998266, -0.250008519, 0.33333354)
_SIN = (39.7596116, -76.5816922, 81.6025335, -41.3416823, 6.28318529)
