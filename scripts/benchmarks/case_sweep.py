"""Case `sweep`: one pass of perturbation arithmetic over a flat tensor of the model's size.

Compared with adding a constant to the same tensor in place, which reads and writes the same memory: 2 x 4 bytes an
element in float32, 2 x 2 in bfloat16. Every pass takes a new key, so that nothing is left over from the one before.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scripts.benchmarks.results import CaseResult, at_most, compare
from scripts.benchmarks.setting import Setting
from scripts.benchmarks.timing import Contender, Timings, measure
from vamo_ft.core.directions import Distribution, HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters

__all__ = ["run_sweep"]

_ADD, _NORMAL = "add_", "torch normal_"
_DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "gaussian")
_TARGETS = {"rademacher": at_most(5.0, 3.0)}


def run_sweep(setting: Setting) -> CaseResult:
    """`axpy_` and torch's `normal_` against `add_`, and `normal_` against `axpy_` with normals; seconds per pass."""
    result = CaseResult()
    for dtype, rounding in ((torch.float32, ""), (torch.bfloat16, ", stochastic rounding")):
        module = nn.Module()
        module.flat = nn.Parameter(torch.zeros(setting.num_parameters, dtype=dtype, device=setting.device))
        flat, moved = module.flat.detach(), 2 * dtype.itemsize * setting.num_parameters
        contenders = [
            Contender(_ADD, _add(flat)),
            *(
                Contender(f"axpy_ {name}", _axpy(TrainableParameters(module), name, stochastic=bool(rounding)))
                for name in _DISTRIBUTIONS
            ),
            Contender(_NORMAL, _normal(flat)),
        ]
        timings = measure(contenders, repeats=setting.repeats, warmup=setting.warmup, device=setting.device)
        title = f"{str(dtype).removeprefix('torch.')}{rounding}"
        for name in _DISTRIBUTIONS:
            row = compare(
                title,
                timings,
                f"axpy_ {name}",
                _ADD,
                target=None if rounding else _TARGETS.get(name),
                rates=_bandwidths(timings, f"axpy_ {name}", _ADD, moved=moved),
            )
            result.rows.append(row)
        result.rows.append(compare(title, timings, _NORMAL, _ADD))
        result.rows.append(compare(title, timings, _NORMAL, "axpy_ gaussian"))
    return result


def _axpy(parameters: TrainableParameters, distribution: Distribution, *, stochastic: bool) -> Callable[[], None]:
    """One pass `p <- p + a z`, with the next step's key."""
    directions = HashedDirections(parameters, distribution=distribution)
    coefficient = torch.tensor([1e-6], dtype=torch.float64, device=parameters.device)
    passes = 0

    def run() -> None:
        nonlocal passes
        rounding = HashKey(0, Domain.ROUNDING, passes, 0) if stochastic else None
        directions.axpy_(parameters.tensors, coefficient, [HashKey(0, Domain.DIRECTION, passes, 0)], rounding=rounding)
        passes += 1

    return run


def _add(flat: Tensor) -> Callable[[], None]:
    def run() -> None:
        flat.add_(1e-6)

    return run


def _normal(flat: Tensor) -> Callable[[], None]:
    def run() -> None:
        flat.normal_()

    return run


def _bandwidths(timings: Timings, a: str, b: str, *, moved: int) -> dict[str, float]:
    """GB/s of both, from their medians."""
    return {side: moved / statistics.median(timings[name]) / 1e9 for side, name in (("a", a), ("b", b))}
