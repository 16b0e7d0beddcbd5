"""Writes what a run has trained as a plain Hugging Face folder."""

import logging
import shutil
from pathlib import Path

from vamo_ft.assemble.model import build_run_runtime, load_run_model
from vamo_ft.assemble.seedlog import replay_seed_log
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Progress
from vamo_ft.models.export import save_model, write_model_card
from vamo_ft.models.loading import LoadedModel
from vamo_ft.models.merging import merge_adapter

__all__ = ["copy_model", "merge_model", "rebuild_model"]

_log = logging.getLogger("vamo_ft")


def copy_model(config: RunConfig, directory: Path, *, weights: Path) -> None:
    """The files of a saved model, with a card if it has none, as in a checkpoint."""
    shutil.copytree(weights, directory, dirs_exist_ok=True)
    if not (directory / "README.md").exists():
        _write_card(config, directory)


def merge_model(config: RunConfig, directory: Path, *, weights: Path) -> None:
    """The base model with the saved adapter merged into it.

    Raises:
        DataError: base model or adapter are not what the configuration says, or the adapter cannot be merged.
    """
    _save(config, directory, load_run_model(config, runtime=build_run_runtime(config), weights=weights), merge=True)


def rebuild_model(
    config: RunConfig, directory: Path, *, seed_log: Path, base: str, steps: int | None, merge: bool, progress: Progress
) -> None:
    """The model, the adapter, or both merged, as `replay_seed_log` rebuilds them.

    Raises:
        DataError: log or base model are damaged or not those of the run, or the adapter cannot be merged.
        UsageError: the log has fewer than `steps` steps.
    """
    loaded, num_steps = replay_seed_log(config, seed_log, base=base, steps=steps, progress=progress)
    model = config.model.model_copy(update={"path": base})
    _save(config.model_copy(update={"model": model}), directory, loaded, merge=merge, num_steps=num_steps)


def _save(
    config: RunConfig, directory: Path, loaded: LoadedModel, *, merge: bool, num_steps: int | None = None
) -> None:
    model = loaded.model
    if merge:
        model, difference = merge_adapter(model)
        _log.info("merged: logits differ by at most %.1e of the largest from those with the adapter", difference)
    save_model(model, loaded.tokenizer, directory)
    _write_card(config, directory, num_steps=num_steps)


def _write_card(config: RunConfig, directory: Path, *, num_steps: int | None = None) -> None:
    facts = {"base model": config.model.path, "training data": config.data.training_paths, "method": config.method.name}
    if num_steps is not None:
        facts["rebuilt from the seed log"] = f"{num_steps} steps"
    write_model_card(directory, title=config.run.name, facts=facts)
