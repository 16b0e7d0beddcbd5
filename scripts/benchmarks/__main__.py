"""Command line of the benchmarks: runs the cases, prints a table and writes JSON."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.arguments import cases_of, positive
from scripts.benchmarks.case_first_order import run_first_order
from scripts.benchmarks.case_memory import run_memory
from scripts.benchmarks.case_snapshot import run_snapshot
from scripts.benchmarks.case_steps import run_mezo, run_mezo_bcd
from scripts.benchmarks.case_sweep import run_sweep
from scripts.benchmarks.machine import machine_facts
from scripts.benchmarks.results import CaseResult, NotAvailable, table
from scripts.benchmarks.setting import Setting, choose_device

CASES: Mapping[str, Callable[[Setting], CaseResult]] = {
    "mezo": run_mezo,
    "mezo_bcd": run_mezo_bcd,
    "sweep": run_sweep,
    "memory": run_memory,
    "first_order": run_first_order,
    "snapshot": run_snapshot,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen cases one after the other; a case that cannot be measured here leaves a note."""
    options = _parse(arguments)
    try:
        device = choose_device(options.device)
    except NotAvailable as reason:
        sys.exit(f"scripts/bench: {reason}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    logging.getLogger("vamo_ft").setLevel(logging.ERROR)  # bfloat16 at MeZO's eps, which is what is measured
    setting = Setting(
        model=options.model,
        batch=options.batch,
        length=options.length,
        labelled=options.labelled,
        repeats=options.repeats,
        warmup=options.warmup,
        device=device,
        precisions=tuple(options.precisions),
    )
    facts = machine_facts(setting.device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(
        f"model {setting.model_name}, {setting.num_parameters:,} parameters; batches of {setting.batch} x "
        f"{setting.length} tokens, {setting.labelled} supervised; {setting.repeats} rounds after {setting.warmup}"
    )
    results: dict[str, CaseResult] = {}
    report: dict[str, Any] = {
        "machine": facts,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "model": {"name": setting.model_name, "parameters": setting.num_parameters},
        "cases": {},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for name in options.cases:
            print(f"{name} ...", file=sys.stderr, flush=True)
            began = time.perf_counter()
            try:
                results[name] = CASES[name](setting)
            except NotAvailable as reason:
                results[name] = CaseResult(notes=[str(reason)])
            report["cases"][name] = {**results[name].to_json(), "seconds": time.perf_counter() - began}
    finally:  # what was measured is not lost to an error or an interrupt
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(table(results))
    print(f"written to {options.out}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Ratios of things measured side by side.")
    parser.add_argument(
        "--cases", type=cases_of(CASES), default=list(CASES), help=f"of {','.join(CASES)}; default: all"
    )
    parser.add_argument(
        "--model",
        default="auto",
        help="auto (the quick start's model if it is there, else random weights of its shape), tiny, or a folder",
    )
    parser.add_argument("--batch", type=positive, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--labelled", type=positive, default=2, help="supervised tokens of a row (%(default)s)")
    parser.add_argument(
        "--precisions",
        type=_precisions,
        default=["float32", "bfloat16"],
        help="of the weights in mezo, mezo_bcd and memory; default: float32,bfloat16",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where it is there, else the CPU"
    )
    parser.add_argument("--threads", type=positive, default=None, help="of torch; default: torch's choice")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.labelled >= options.length:
        parser.error("--labelled must be below --length")
    return options


def _precisions(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ("float32", "bfloat16")]:
        raise argparse.ArgumentTypeError(f"no precision {unknown[0]}; there are float32 and bfloat16")
    return names


if __name__ == "__main__":
    main()
