"""The peak memory of one kind of work, in a process of its own; prints one line of JSON, in bytes.

Linux keeps the peak of the resident size (VmHWM) and sets it back to the present size on request. Where it does not, a
thread looks at the resident size every millisecond.
"""

import argparse
import ctypes
import gc
import importlib
import json
import logging
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.benchmarks.methods import build_ours, mean_loss, objective_of, spsa
from scripts.benchmarks.results import NotAvailable
from scripts.benchmarks.setting import Setting, choose_device

__all__ = ["WORKS", "can_measure", "main"]

WORKS = ("inference", "mezo", "mezo block")
_STATUS, _STATM = Path("/proc/self/status"), Path("/proc/self/statm")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def can_measure(device: torch.device) -> bool:
    """Whether there is a way to see the peak."""
    return device.type == "cuda" or _STATM.exists()


@dataclass
class _Peak:
    """The highest memory of a block, once it has ended."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[_Peak]:
    """Watches the block; memory that was free before it is given back to the system first."""
    gc.collect()
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if _set_mark_back():
        yield peak
        peak.bytes = _status("VmHWM")
    else:
        ended = threading.Event()
        sampler = threading.Thread(target=_sample, args=(peak, ended))
        sampler.start()
        yield peak
        ended.set()
        sampler.join()


def present_memory(device: torch.device) -> int:
    """Bytes in use: resident, or allocated on CUDA."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(_STATM.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


def _set_mark_back() -> bool:
    """Whether the peak's mark now stands at the present size."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmHWM") <= 1.01 * _status("VmRSS") + (1 << 20)
    except (OSError, KeyError):
        return False


def _status(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _sample(peak: _Peak, ended: threading.Event) -> None:
    while not ended.wait(0.001):
        peak.bytes = max(peak.bytes, present_memory(torch.device("cpu")))


def _prepare(work: str, setting: Setting, dtype: str) -> tuple[Callable[[], object], int]:
    """What to run, and how often it takes to meet everything: a block-coordinate method needs a whole cycle."""
    model, batch = setting.build_model(_DTYPES[dtype]), setting.one_batch()
    if work == "inference":
        objective = objective_of(model)
        return lambda: float(mean_loss(objective, batch)), 2
    values = spsa(structure="block" if work == "mezo block" else "full")
    method = build_ours(values, model, setting.samples(setting.batch), setting, dtype=dtype)
    return lambda: method.step([batch]), setting.num_blocks if work == "mezo block" else 2


def main() -> None:
    """Measures one kind of work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=WORKS, required=True)
    parser.add_argument("--dtype", choices=list(_DTYPES), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    for name in ("batch", "length", "labelled", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("vamo_ft").setLevel(logging.ERROR)
    device = choose_device(options.device)
    setting = Setting(
        model=options.model,
        batch=options.batch,
        length=options.length,
        labelled=options.labelled,
        repeats=1,
        warmup=0,
        device=device,
    )
    importlib.import_module("torch._inductor.compile_fx")  # the compiler: an import for every kind of work
    imports = present_memory(device)
    try:
        run, times = _prepare(options.work, setting, options.dtype)
    except NotAvailable as reason:
        print(json.dumps({"note": str(reason)}))
        return
    peaks: dict[str, int] = {}
    for phase in ("first", "steady"):
        with peak_memory(device) as peak:
            for _ in range(times):
                run()
        peaks[phase] = peak.bytes - imports
    print(json.dumps({"imports": imports, **peaks}))


if __name__ == "__main__":
    main()
