"""`vamo-ft export`: a plain Hugging Face folder from a run, a checkpoint, or a seed log and its base model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from safetensors import SafetensorError

from vamo_ft.assemble import Packaging, check_push, copy_model, merge_model, push_folder, rebuild_model
from vamo_ft.commands.console import logging_to
from vamo_ft.commands.secrets import masked
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.training.checkpoint import checkpoint_folders, open_checkpoint
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.rundir import RunDirectory, sync_folder
from vamo_ft.training.runtime import memory_errors_explained

__all__ = ["export"]


def export(
    config: RunConfig,
    *,
    source: Path,
    out: Path,
    base: str | None,
    steps: int | None,
    merge: bool,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    max_shard_size: str | None,
    push_to_hub: str | None,
    private: bool,
) -> None:
    """Writes `out`, whole or not at all, and uploads it where that is asked for.

    Args:
        config: the run's configuration.
        source: the folder of the model; with `base` the seed log.
        base: rebuild the weights from this model; None: take those of `source`.
        steps: with `base`, updates to make again; None: all.
        merge: write the whole model with the adapter merged into it.
        dtype: precision of a whole model's weights; None: that of the run.
        max_shard_size: largest file of weights, such as 5GB, which is what None stands for.
        push_to_hub: OWNER/NAME to upload to; None: the folder stays here.
        private: of a repository that is new.

    Raises:
        UsageError: `out` is taken, options contradict each other or the run, or the upload failed.
        DataError: something is damaged, or is not what the configuration says.
    """
    if steps is not None and base is None:
        raise UsageError("--steps: needs --from-seedlog; without it, name one of the run's checkpoints")
    if merge and config.model.adapter is None:
        raise UsageError("--merge: the run trained no adapter, and its model is whole already; leave it out")
    if dtype is not None and config.model.adapter is not None and not merge:
        raise UsageError("--dtype: an adapter stays in float32; add --merge, or leave it out")
    if private and push_to_hub is None:
        raise UsageError("--private: needs --push-to-hub")
    if push_to_hub is not None:
        check_push(push_to_hub, offline=config.run.offline)
    packaging = Packaging(dtype, max_shard_size)
    console = Console(stderr=True)
    with logging_to(console), memory_errors_explained("the export"), _in_place_of(out) as folder:
        if base is not None:
            rebuild_model(
                config,
                folder,
                seed_log=source,
                base=base,
                steps=steps,
                merge=merge,
                packaging=packaging,
                progress=ConsoleProgress(console),
            )
        else:
            run, step = _origin(source, config)
            write = merge_model if merge else copy_model
            write(config, folder, weights=source, run=run, step=step, packaging=packaging)
        card = folder / "README.md"  # shows the configuration to whoever gets the folder
        card.write_text(masked(card.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"model: {out}")
    if push_to_hub is not None:
        address = push_folder(out, push_to_hub, private=private, message=f"{config.run.name}, trained with vamo-ft")
        print(f"hub:   {address}")


def _origin(model: Path, config: RunConfig) -> tuple[Path, int]:
    """The run directory and the step of a model folder; a checkpoint's files are verified."""
    if (model.parent / "MANIFEST.json").is_file():
        return model.parent.parent.parent, open_checkpoint(model.parent).step
    run = RunDirectory(model.parent)
    step = run.read_status().get("model_step")
    if not isinstance(step, int):  # a run of an earlier version: its model is that of the last step
        folders = checkpoint_folders(run.checkpoints)
        step = int(folders[0].name.rpartition("-")[2]) if folders else config.training.steps or 0
    return run.root, step


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
