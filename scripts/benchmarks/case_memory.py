"""Case `memory`: the peak of a MeZO step, less what inference on the same batch needs.

Every figure comes from a process of its own (`memory_probe`): the peak resident size during the steps, less the size
after the imports, so that weights, activations and all else count on both sides. The model is loaded before the peak's
mark is set back. On CUDA it is the peak of the allocator. `steady` leaves out the very first cycle of steps, `first`
is that one, in which kernels are compiled.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

from scripts.benchmarks.memory_probe import WORKS, can_measure
from scripts.benchmarks.results import CaseResult, NotAvailable, at_most, compare
from scripts.benchmarks.setting import Setting

__all__ = ["run_memory"]

_ROOT = Path(__file__).resolve().parents[2]
_MOST_REPEATS = 3  # a peak hardly varies, and every figure loads the model
_TARGET = at_most(1.15, 1.05)
_MIB = 1 << 20


def run_memory(setting: Setting) -> CaseResult:
    """Peaks in MiB, and their ratio as extra percent."""
    if not can_measure(setting.device):
        raise NotAvailable("not available: needs Linux's /proc, or CUDA")
    result = CaseResult()
    for dtype in setting.precisions:
        peaks: dict[str, list[float]] = defaultdict(list)
        for _ in range(min(setting.repeats, _MOST_REPEATS)):
            for work in WORKS:
                answer = _probe(setting, work=work, dtype=dtype)
                if "note" in answer:
                    if (note := f"{work}: {answer['note']}") not in result.notes:
                        result.notes.append(note)
                    continue
                for phase in ("first", "steady"):
                    peaks[f"{work} {phase}"].append(answer[phase] / _MIB)
        for phase in ("steady", "first"):
            for work in WORKS[1:]:
                if peaks[f"{work} {phase}"]:
                    row = compare(
                        f"{dtype}",
                        peaks,
                        f"{work} {phase}",
                        f"{WORKS[0]} {phase}",
                        target=_TARGET if phase == "steady" else None,
                        unit="MiB",
                        shown_as="extra",
                    )
                    result.rows.append(row)
    return result


def _probe(setting: Setting, *, work: str, dtype: str) -> dict[str, int]:
    """What one process measured."""
    options = {
        "model": setting.model,
        "device": setting.device.type,
        "batch": setting.batch,
        "length": setting.length,
        "labelled": setting.labelled,
        "threads": torch.get_num_threads(),
    }
    arguments = [f"--{name}={value}" for name, value in {**options, "work": work, "dtype": dtype}.items()]
    command = [sys.executable, "-m", "scripts.benchmarks.memory_probe", *arguments]
    done = subprocess.run(command, cwd=_ROOT, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer
