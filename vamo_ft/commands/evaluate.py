"""`vamo-ft evaluate`: loss and scores of a finished run or of a checkpoint."""

from pathlib import Path

from rich.console import Console

from vamo_ft.assemble import evaluate_model
from vamo_ft.commands.console import logging_to
from vamo_ft.config.data import DataConfig, DataSetConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.runtime import memory_errors_explained

__all__ = ["evaluate"]


def evaluate(
    config: RunConfig, *, model: Path, data: str | None, use_cache: bool = True, predictions: Path | None = None
) -> None:
    """Prints the loss, of free text the perplexity, and accuracy or the scores that `evaluation.metrics` names.

    Args:
        config: the run's configuration.
        model: the folder of the model to evaluate.
        data: evaluate on this data set instead of the run's `data.evaluation`; same columns.
        use_cache: keep tokens, and take them from where they were kept.
        predictions: a file to write, or to replace, with what the model answers to each sample.

    Raises:
        UsageError: there is nothing to evaluate on, or no file can be there.
        DataError: model or data are not what the configuration says.
    """
    if data == "":
        raise UsageError("--data: names no data set")
    data_set = config.data.evaluation if data is None else _alike(config.data, data)
    if data_set is None:
        raise UsageError("the run's configuration has no data.evaluation; name a data set with --data")
    if predictions is not None and (predictions.is_dir() or not predictions.parent.is_dir()):
        fault = "is a folder" if predictions.is_dir() else f"there is no folder {predictions.parent}"
        raise UsageError(f"--predictions: {predictions}: {fault}; name a file")
    console = Console(stderr=True)
    with logging_to(console), memory_errors_explained("loading the model"):
        result = evaluate_model(
            config,
            data_set,
            weights=model,
            progress=ConsoleProgress(console),
            use_cache=use_cache,
            predictions=predictions,
        )
    figures = {"loss": result.loss}
    if "perplexity" in config.data.format.metrics:
        figures["perplexity"] = result.perplexity
    figures |= result.scores
    width = max(len("accuracy"), *map(len, figures))
    print(f"{'samples':<{width}}  {result.num_samples}")
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4f}")


def _alike(config: DataConfig, path: str) -> DataSetConfig:
    """Another data set with the columns and the format of the run's."""
    known = config.evaluation or config.training_sets[0]
    return DataSetConfig(path=path, columns=known.columns, format=known.format)
