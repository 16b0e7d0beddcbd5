"""Tasks of EleutherAI's lm-evaluation-harness on a model folder; an optional dependency."""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vamo_ft.config.model import ModelConfig
from vamo_ft.core.errors import UsageError, VamoFtError
from vamo_ft.models.folder import first_words

__all__ = ["TaskScore", "run_tasks"]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One figure of a task.

    Attributes:
        task: the harness's name for it.
        metric: with the filter where there is one, such as `acc` or `exact_match,strict-match`.
        value: as the harness gives it.
        error: standard error; None: the harness knows none.
    """

    task: str
    metric: str
    value: float
    error: float | None


def run_tasks(
    config: ModelConfig, tasks: Sequence[str], *, weights: Path, limit: int | None, batch_size: int, device: str
) -> list[TaskScore]:
    """What `lm_eval.simple_evaluate` finds with its own loader, prompts and scores.

    Args:
        config: of the run; with an adapter its base is loaded, and the adapter put on it.
        tasks: names of tasks or groups.
        weights: folder of the model or adapter.
        limit: samples of each task; None: all.
        batch_size: samples at a time.
        device: such as cpu or cuda.

    Raises:
        UsageError: the harness is not installed, or refused; its reason is named.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks: running them needs another package: pip install 'vamo-ft[lm-eval]'")
    harness = importlib.import_module("lm_eval")
    try:
        found = harness.simple_evaluate(
            model="hf",
            model_args=_model_args(config, weights),
            tasks=list(tasks),
            limit=limit,
            batch_size=batch_size,
            device=device,
        )
    except (VamoFtError, MemoryError, RuntimeError):  # an allocation that failed is explained elsewhere
        raise
    except Exception as error:  # of a library whose errors are of every kind: unknown tasks, data that is not there
        raise UsageError(f"--tasks: lm-eval: {first_words(error)}") from error
    return list(_scores(found["results"]))


def _model_args(config: ModelConfig, weights: Path) -> dict[str, Any]:
    common = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    if config.adapter is None:
        return {"pretrained": str(weights), **common}
    return {
        "pretrained": config.path,
        "revision": config.revision or "main",
        "peft": str(weights),
        "tokenizer": str(weights),
        **common,
    }


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[TaskScore]:
    """From `{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}` of each task."""
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else key
            yield TaskScore(task, name, float(value), float(error) if isinstance(error, int | float) else None)
