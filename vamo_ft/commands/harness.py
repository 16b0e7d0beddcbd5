"""`vamo-ft evaluate --tasks`: public benchmarks through lm-evaluation-harness."""

from pathlib import Path

from rich.console import Console

from vamo_ft.assemble import run_tasks
from vamo_ft.commands.console import logging_to
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.training.runtime import build_runtime, memory_errors_explained

__all__ = ["evaluate_tasks"]


def evaluate_tasks(
    config: RunConfig,
    *,
    model: Path,
    tasks: str | None,
    limit: int | None,
    data: str | None,
    predictions: Path | None = None,
) -> None:
    """Prints what the harness measures, one figure a line with its standard error.

    Args:
        config: the run's configuration.
        model: the folder of the model or adapter.
        tasks: the harness's names, separated by commas.
        limit: samples of each task; None: all.
        data: has to be None.
        predictions: has to be None.

    Raises:
        UsageError: options contradict each other or the run, or the harness is missing or refuses.
    """
    if tasks is None:
        raise UsageError("--limit: needs --tasks; of the run's own data, set data.evaluation.limit")
    if data is not None:
        raise UsageError("--data: tasks bring their own data; leave it or --tasks out")
    if predictions is not None:
        raise UsageError("--predictions: are of the run's own data; leave it or --tasks out")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks: names none; write such as --tasks arc_easy,hellaswag")
    if config.model.task == "sequence_classification":
        raise UsageError("--tasks: the run trained a classifier, and tasks are for language models")
    if config.model.path.endswith(".gguf") and config.model.adapter is not None:
        raise UsageError("--tasks: the base is a .gguf file, which lm-eval does not read; export with --merge first")
    with logging_to(Console(stderr=True)), memory_errors_explained("the tasks"):
        scores = run_tasks(
            config.model,
            names,
            weights=model,
            limit=limit,
            batch_size=config.training.batch_size,
            device=build_runtime(autocast=None).device.type,
        )
    width = max((len(f"{score.task} {score.metric}") for score in scores), default=0)
    for score in scores:
        error = "" if score.error is None else f" ± {score.error:.4f}"
        print(f"{f'{score.task} {score.metric}':<{width}}  {score.value:.4f}{error}")
