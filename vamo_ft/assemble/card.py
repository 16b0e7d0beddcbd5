"""What a run's files say about a model of it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vamo_ft.config.load import dump_config
from vamo_ft.config.schema import RunConfig
from vamo_ft.models.card import Card
from vamo_ft.training.rundir import read_json

__all__ = ["build_card"]

_COUNTS = {"forward_evals": "forward sample evaluations", "backward_evals": "backward sample evaluations"}
_NOT_METRICS = ("eval.samples", "eval.seconds")
_PACKAGES = ("vamo-ft", "torch", "transformers", "peft")


def build_card(config: RunConfig, *, run: Path, step: int, facts: Mapping[str, str] | None = None) -> Card:
    """The card of the model after `step` steps.

    Args:
        run: the run's directory; files that are missing there leave their lines out.
        facts: further rows of the table.
    """
    lines = list(_metrics(run / "metrics.jsonl", step=step))
    trained: Mapping[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
    evaluated = {line["step"]: line for line in lines if any(name.startswith("eval.") for name in line)}
    before, after = evaluated.get(0, {}), evaluated.get(step, {})
    names = [name for name in {**before, **after} if name.startswith("eval.") and name not in _NOT_METRICS]
    return Card(
        title=config.run.name,
        base_model=config.model.path,
        data_sets=config.data.training_paths,
        tags=[config.method.name, *([] if config.model.adapter is None else [config.model.adapter.type])],
        facts={**_facts(config, trained, read_json(run / "environment.json"), step=step), **(facts or {})},
        evaluations={name.removeprefix("eval."): (before.get(name), after.get(name)) for name in names},
        config=dump_config(config),
    )


def _facts(
    config: RunConfig, trained: Mapping[str, Any], environment: Mapping[str, Any], *, step: int
) -> dict[str, str]:
    facts = {
        "base model": config.model.path,
        "training data": " and ".join(config.data.training_paths),
        "method": config.method.name,
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "steps": f"{step} of {config.training.batch_size} samples",
    }
    facts |= {text: f"{trained[key]:,}" for key, text in _COUNTS.items() if isinstance(trained.get(key), int)}
    if isinstance(seconds := trained.get("seconds"), int | float):
        facts["training time"] = f"{seconds:.0f} s"
    if isinstance(peak := trained.get("peak_memory_bytes"), int):
        facts["peak memory"] = f"{peak / 1e9:.2f} GB"
    if isinstance(device := environment.get("device"), str):
        facts["device"] = device
    versions = environment.get("packages")
    if isinstance(versions, dict):
        facts["versions"] = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if versions.get(name))
    return facts


def _metrics(path: Path, *, step: int) -> Iterator[dict[str, Any]]:
    """The lines up to `step`; what is no line of metrics is passed over."""
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= step:
                    yield line
    except (OSError, UnicodeDecodeError):
        return
