"""Command line of the paper's experiments: runs them, writes the numbers as JSON and the curves as pictures."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scripts.paper_figures.figures import table, write_results
from scripts.paper_figures.language_model import METHODS, RunEnded, run_language_model
from vamo_ft.assemble.surroundings import Surroundings
from vamo_ft.commands.console import logging_to
from vamo_ft.config.errors import ConfigError
from vamo_ft.config.load import load_experiment
from vamo_ft.core.errors import VamoFtError
from vamo_ft.studies.paper import run_experiment
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.signals import StopSignals

SYNTHETIC = ("least_squares", "digits_mlp")
CONFIGS = Path("configs/paper")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen experiments one after the other."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    try:
        with logging_to(console), StopSignals() as signals:
            surroundings = Surroundings(progress=ConsoleProgress(console), stop_requested=signals.requested)
            for name in options.experiments:
                began = time.perf_counter()
                if name in SYNTHETIC:
                    numbers = _run_synthetic(name, options, surroundings)
                else:
                    numbers = _run_language_model(options)
                print(
                    f"{table(numbers)}\n\n{time.perf_counter() - began:.0f} s; in {options.out}/{name}.png and .json\n"
                )
    except (ConfigError, VamoFtError, RunEnded) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _run_synthetic(name: str, options: argparse.Namespace, surroundings: Surroundings) -> dict[str, Any]:
    overrides = list(options.set)
    if options.seeds is not None:
        overrides.append(f"seeds={list(range(options.seeds))}")
    if options.quick:
        overrides += ["steps=100", "seeds=[0, 1]"]
    experiment = load_experiment(CONFIGS / f"{name}.yaml", overrides=overrides)
    arms = run_experiment(experiment, surroundings)
    facts = {"experiment": experiment.model_dump(mode="json"), "threads": torch.get_num_threads()}
    return write_results(name, experiment.title, arms, facts=facts, out=options.out)


def _run_language_model(options: argparse.Namespace) -> dict[str, Any]:
    overrides = list(options.set)
    if options.quick:
        overrides += ["training.steps=3", "data.train.limit=24", "data.evaluation.limit=8", "logging.every=1 step"]
    arms, held_out = run_language_model(
        options.methods,
        seeds=range(1 if options.quick else options.seeds or 5),
        overrides=overrides,
        folder=options.out / ("sst2-quick" if options.quick else "sst2"),
    )
    return write_results("sst2", "SST-2, SmolLM2-135M with LoRA", arms, facts={"held_out": held_out}, out=options.out)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/paper", description="Training curves of the paper's experiments.")
    parser.add_argument(
        "--experiments",
        type=lambda text: text.split(","),
        default=list(SYNTHETIC),
        help=f"of {','.join(SYNTHETIC)},sst2; default: least_squares,digits_mlp",
    )
    parser.add_argument("--seeds", type=int, help="seeds 0 to this less one; default: five")
    parser.add_argument("--quick", action="store_true", help="few steps and seeds, to see that everything works")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=list(METHODS), help="sst2: files in configs/paper/sst2"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key of every file that is run"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the synthetic experiments (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("build/paper"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.experiments if name not in (*SYNTHETIC, "sst2")]:
        parser.error(f"no experiment {unknown[0]}; there are {', '.join(SYNTHETIC)} and sst2")
    return options


if __name__ == "__main__":
    main()
