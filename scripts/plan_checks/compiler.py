"""What `torch.compile` takes of main memory to make the kernels of directions: where
`vamo_ft.core.kernels.COMPILER_BYTES` comes from.

Each line is a process of its own with an empty cache: the highest resident size while the kernels of probe points and
of the update are compiled, and the size afterwards, both less the size when the program, its libraries and the
compiler were imported.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from scripts.benchmarks.memory_probe import peak_memory, present_memory
from scripts.plan_checks.clean import clean_environment
from vamo_ft.core.directions import Distribution, HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.kernels import load_compiler
from vamo_ft.core.parameters import TrainableParameters

_ROOT = Path(__file__).resolve().parents[2]
_CPU = torch.device("cpu")
_MIB = 1 << 20
_LAWS: tuple[Distribution, ...] = ("rademacher", "gaussian")


class _Small(nn.Module):
    """A large tensor, and small ones that are stacked: both kinds of launches."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(1 << 17, dtype=dtype))
        self.vectors = nn.ParameterList([nn.Parameter(torch.zeros(300, dtype=dtype)) for _ in range(3)])


def _measure(law: Distribution, dtype: torch.dtype) -> None:
    importlib.import_module("vamo_ft.assemble.parts")  # the libraries of a run, of which the compiler uses some
    load_compiler()
    nn.Linear(64, 64)(torch.ones(8, 64)).sum().backward()  # lets torch take what it takes once
    parameters = TrainableParameters(_Small(dtype))
    directions = HashedDirections(parameters, distribution=law, compile_kernels=True)
    own, displaced = [tensor.data for tensor in parameters.tensors], parameters.copy()
    keys, rounding = [HashKey(0, Domain.DIRECTION, 0, 0)], HashKey(0, Domain.ROUNDING, 0, 0)
    before = present_memory(_CPU)
    with peak_memory(_CPU) as peak:
        directions.axpy_(displaced, torch.ones(1, dtype=torch.float64), keys, rounding=rounding, sources=own)
        directions.axpy_(own, torch.ones(1), keys, rounding=rounding)
        directions.axpy_(own, torch.ones(1), keys, rounding=rounding, scales=[0.5] * len(own))
    highest, after = peak.bytes - before, present_memory(_CPU) - before
    print(f"| {law}, {dtype} | {highest / _MIB:.0f} | {after / _MIB:.0f} |", flush=True)


def main() -> None:
    """One line of a Markdown table for each law and type."""
    if sys.argv[1:]:
        torch.set_num_threads(1)
        _measure(_LAWS[int(sys.argv[1])], getattr(torch, sys.argv[2]))
        return
    print("| kernels | highest MiB | afterwards MiB |\n|---|---:|---:|", flush=True)
    for number in range(len(_LAWS)):
        for dtype in ("float32", "bfloat16"):
            with clean_environment() as environment:
                command = [sys.executable, "-m", "scripts.plan_checks.compiler", str(number), dtype]
                subprocess.run(command, cwd=_ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
