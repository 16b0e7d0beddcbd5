"""The peak of one case, planned or of a real run, in a process of its own; prints a number of bytes.

A run's figure is the highest resident size (VmHWM, set back once the model is loaded) less the size before it was
loaded, when the program and its libraries and the tokenizer were there. Of several processes, started as a launcher
does it, each prints its own.
"""

import argparse
import importlib
import logging

import torch

from scripts.benchmarks.memory_probe import peak_memory, present_memory
from scripts.plan_checks.cases import CASES, case_config
from vamo_ft.assemble.memory import MemoryPlanner
from vamo_ft.assemble.parts import build_outline, build_parts
from vamo_ft.assemble.pilot import StepCost, pilot_of
from vamo_ft.assemble.surroundings import Surroundings
from vamo_ft.config.schema import RunConfig
from vamo_ft.models.export import gathered
from vamo_ft.models.loading import load_tokenizer
from vamo_ft.training.ledger import Ledger
from vamo_ft.training.pretended import pretended
from vamo_ft.training.progress import SilentProgress
from vamo_ft.training.runtime import connected

_CPU = torch.device("cpu")
_STEPS = 8  # one epoch: the largest batch is among them, and the snapshot before the first or after a warm-up


def _planned(config: RunConfig, processes: int) -> int:
    with pretended(processes) as others:
        planner = MemoryPlanner(config, build_outline(config, processes=others), device_type="cpu")
        return planner.plan(config, micro_batch_size=config.training.batch_size).peak


def _run(config: RunConfig) -> int:
    importlib.import_module("torch._inductor.compile_fx")
    tokenizer = load_tokenizer(config.model, offline=True)
    _warm_up()
    before = present_memory(_CPU)
    parts = build_parts(config, weights=None)
    del tokenizer
    made = 0

    def enough(cost: StepCost, ledger: Ledger) -> bool:
        nonlocal made
        made += 1
        return made >= _STEPS

    with peak_memory(_CPU) as peak:
        surroundings = Surroundings(progress=SilentProgress(), stop_requested=lambda: False)
        pilot_of(config, parts, surroundings, least=_STEPS, by_layer=False, enough=enough)
        if parts.parameters.sharded:  # for a checkpoint the first process puts the whole together
            gathered(parts.loaded.model, keep=parts.runtime.is_main)
    return peak.bytes - before


def _warm_up() -> None:
    """Lets the libraries take what they take once."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        layer(torch.ones(8, 64, dtype=dtype)).sum().backward()


def main() -> None:
    """Plans or runs one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("case", choices=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("vamo_ft").setLevel(logging.ERROR)
    config = case_config(options.case)
    if options.what == "plan":
        print(_planned(config, CASES[options.case].processes))
        return
    with connected():
        print(_run(config))


if __name__ == "__main__":
    main()
