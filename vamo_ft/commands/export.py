"""`vamo-ft export`: a plain Hugging Face folder from a run, a checkpoint, or a seed log and its base model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from vamo_ft.assemble import copy_model, merge_model, rebuild_model
from vamo_ft.commands.console import logging_to
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.training.checkpoint import open_checkpoint
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.rundir import sync_folder
from vamo_ft.training.runtime import memory_errors_explained

__all__ = ["export"]


def export(config: RunConfig, *, source: Path, out: Path, base: str | None, steps: int | None, merge: bool) -> None:
    """Writes `out`, whole or not at all.

    Args:
        config: the run's configuration.
        source: the folder of the model; with `base` the seed log.
        base: rebuild the weights from this model; None: take those of `source`.
        steps: with `base`, updates to make again; None: all.
        merge: write the whole model with the adapter merged into it.

    Raises:
        UsageError: `out` is taken, or options contradict each other or the run.
        DataError: something is damaged, or is not what the configuration says.
    """
    if steps is not None and base is None:
        raise UsageError("--steps: needs --from-seedlog; without it, name one of the run's checkpoints")
    if merge and config.model.adapter is None:
        raise UsageError("--merge: the run trained no adapter, and its model is whole already; leave it out")
    console = Console(stderr=True)
    with logging_to(console), memory_errors_explained("the export"), _in_place_of(out) as folder:
        if base is not None:
            progress = ConsoleProgress(console)
            rebuild_model(config, folder, seed_log=source, base=base, steps=steps, merge=merge, progress=progress)
        else:
            if (source.parent / "MANIFEST.json").is_file():
                open_checkpoint(source.parent)  # verified, file by file
            (merge_model if merge else copy_model)(config, folder, weights=source)
    print(f"model: {out}")


@contextmanager
def _in_place_of(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place at the end of the block, if nothing was raised in it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not an empty folder; choose another")
    aside = out.absolute().with_name(f".{out.absolute().name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        sync_folder(aside)
        aside.rename(out)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{out}: could not be written: {error}; make room, or choose another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
