"""Fine-tuning on SST-2: one `vamo-ft train` for each method and seed, and what its metrics.jsonl says."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from vamo_ft.studies.curves import ArmResult, CurvePoint, SeedRun

CONFIGS = Path("configs/paper/sst2")
METHODS = ("adamw", "vamo", "mezo")
"""The methods that run where none are named; the folder holds more."""


class RunEnded(Exception):
    """A run that did not finish, with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a run ended with exit code {exit_code}")
        self.exit_code = exit_code


def run_language_model(
    methods: Sequence[str], *, seeds: Sequence[int], overrides: Sequence[str], folder: Path
) -> tuple[list[ArmResult], dict[str, Any]]:
    """Trains every method on every seed, going on with runs that are there.

    Returns:
        Curves of the mean loss since the line before, and for each method what its evaluations say.

    Raises:
        RunEnded: a run ended early; it has said why, and goes on when it is started again.
    """
    runs: dict[str, list[SeedRun]] = {method: [] for method in methods}
    rates: dict[str, float] = {}
    held_out: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            name = f"{method}-{seed}"
            settings = [f"run.output_dir={folder}", f"run.name={name}", f"run.seed={seed}", *overrides]
            command = [sys.executable, "-m", "vamo_ft", "train", str(CONFIGS / f"{method}.yaml")]
            code = subprocess.run([*command, *(word for item in settings for word in ("--set", item))]).returncode
            if code != 0:
                raise RunEnded(code)
            lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
            training = [line for line in lines if "loss" in line]
            runs[method].append(SeedRun(seed, [_point(line) for line in training]))
            rates[method] = training[-1]["learning_rate"]
            held_out[method].append([line for line in lines if "eval.loss" in line][-1])
    arms = [ArmResult(method, rates[method], [], runs[method]) for method in methods]
    keys = ("eval.loss", "eval.accuracy")
    return arms, {
        method: {key: mean(line[key] for line in lines) for key in keys} for method, lines in held_out.items()
    }


def _point(line: dict[str, Any]) -> CurvePoint:
    return CurvePoint(line["step"], line["forward_evals"], line["backward_evals"], line["seconds"], line["loss"])
