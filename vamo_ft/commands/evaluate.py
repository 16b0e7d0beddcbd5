"""`vamo-ft evaluate`: loss and accuracy of a finished run or of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vamo_ft.assemble import evaluate_model
from vamo_ft.commands.console import logging_to
from vamo_ft.config.load import load_config
from vamo_ft.config.schema import DataSetConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.training.progress import ConsoleProgress

__all__ = ["evaluate"]


def evaluate(target: Path, *, data: str | None, overrides: Sequence[str]) -> None:
    """Prints loss and accuracy.

    Args:
        target: a run directory, or a checkpoint in one.
        data: evaluate on this data set instead of the run's `data.evaluation`; same columns.
        overrides: `key=value` pairs that replace what the run's config.yaml says.

    Raises:
        UsageError: `target` is neither, or there is nothing to evaluate on.
        ConfigError: the run's configuration, or an override, is not valid.
    """
    run, model = _places(target)
    config = load_config(run / "config.yaml", overrides=overrides).config
    data_set = DataSetConfig(path=data) if data is not None else config.data.evaluation
    if data_set is None:
        raise UsageError(f"{run}: its configuration has no data.evaluation; name a data set with --data")
    console = Console(stderr=True)
    with logging_to(console):
        result = evaluate_model(config, data_set, weights=model, progress=ConsoleProgress(console))
    print(f"samples   {result.num_samples}")
    print(f"loss      {result.loss:.4f}")
    if result.accuracy is not None:
        print(f"accuracy  {result.accuracy:.4f}")


def _places(target: Path) -> tuple[Path, Path]:
    """The run directory and the model folder that `target` means."""
    model = target / "model"
    for run in (target, target.parent.parent):
        if model.is_dir() and (run / "config.yaml").is_file():
            return run, model
    if (target / "config.yaml").is_file():
        raise UsageError(f"{target}: this run has no final model yet; name one of its checkpoints")
    raise UsageError(f"{target}: neither a run directory nor a checkpoint in one")
