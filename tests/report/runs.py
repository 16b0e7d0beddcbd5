"""Run directories as training leaves them, written by hand."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG = """\
run: {name: %s, output_dir: runs, seed: 3}
model: {path: some/model}
method: {name: vamo, probes: 4}
optimizer: {name: adamw, learning_rate: 0.001}
"""


def training_line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 4.0 / step,
        "learning_rate": 0.001,
        "grad_norm": 1.5,
        "tokens": 100 * step,
        "samples": 8 * step,
        "forward_evals": 24 * step,
        "backward_evals": 8 * step,
        "flops": 10**15 * step,
        "seconds": 0.5 * step,
        "peak_memory_bytes": 1_500_000_000,
        "tokens_per_second": 200.0,
        "method.alpha": 0.25,
        "method.correlation": 0.5,
        **changes,
    }


def evaluation_line(step: int, loss: float | None, accuracy: float) -> dict[str, Any]:
    return {"step": step, "eval.loss": loss, "eval.accuracy": accuracy, "eval.samples": 9, "eval.seconds": 0.1}


def write_run(
    directory: Path,
    lines: Iterable[Mapping[str, Any]] | None = None,
    *,
    state: Mapping[str, Any] | None = None,
    config: str | None = None,
) -> Path:
    """A finished run of four lines, or what is given."""
    directory.mkdir(parents=True, exist_ok=True)
    if lines is None:
        lines = [
            evaluation_line(0, 5.0, 0.5),
            training_line(2),
            training_line(4),
            evaluation_line(4, 2.0, 0.9),
        ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")
    (directory / "config.yaml").write_text(config or CONFIG % "tiny", encoding="utf-8")
    status = {"state": "finished", "exit_code": 0, "time": "2026-01-02T03:04:05+00:00"} if state is None else state
    (directory / "status.json").write_text(json.dumps(status), encoding="utf-8")
    (directory / "environment.json").write_text(json.dumps({"python": "3.11.9", "packages": {"torch": "2.13"}}))
    return directory
