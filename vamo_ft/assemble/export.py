"""Writes what a run has trained as a plain Hugging Face folder."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vamo_ft.assemble.card import build_card
from vamo_ft.assemble.model import load_whole_model
from vamo_ft.assemble.seedlog import replay_seed_log
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Progress
from vamo_ft.models.card import write_model_card
from vamo_ft.models.export import Dtype, save_model, shard_bytes
from vamo_ft.models.loading import LoadedModel
from vamo_ft.models.merging import cast, merge_adapter

__all__ = ["Packaging", "copy_model", "merge_model", "rebuild_model"]

_log = logging.getLogger("vamo_ft")


@dataclass(frozen=True, slots=True)
class Packaging:
    """How weights are written.

    Attributes:
        dtype: of a whole model's parameters; None: as they are.
        max_shard_size: largest file of weights, such as 5GB; None: 5GB.
    """

    dtype: Dtype | None = None
    max_shard_size: str | None = None


def copy_model(
    config: RunConfig, directory: Path, *, weights: Path, run: Path, step: int, packaging: Packaging
) -> None:
    """The files of a saved model, or that model written anew where other files are asked for; with a card.

    Raises:
        DataError: the model is not what the configuration says.
        UsageError: the size of files is none.
    """
    size = None if packaging.max_shard_size is None else shard_bytes(packaging.max_shard_size)
    larger = size is not None and any(path.stat().st_size > size for path in weights.glob("*.safetensors"))
    if packaging.dtype is not None or (larger and config.model.adapter is None):
        loaded = load_whole_model(config, weights=weights)
        _save(config, directory, loaded, merge=False, run=run, step=step, packaging=packaging)
    else:
        shutil.copytree(weights, directory, dirs_exist_ok=True)
        write_model_card(directory, build_card(config, run=run, step=step))


def merge_model(
    config: RunConfig, directory: Path, *, weights: Path, run: Path, step: int, packaging: Packaging
) -> None:
    """The base model with the saved adapter merged into it: where training quantised it, into the base as it was, and
    where it is stored in 4 bits, into the values that these stand for.

    Raises:
        DataError: base model or adapter are not what the configuration says, or the adapter cannot be merged.
    """
    loaded = _load_to_merge(config, weights=weights)
    _save(config, directory, loaded, merge=True, run=run, step=step, packaging=packaging)


def rebuild_model(
    config: RunConfig,
    directory: Path,
    *,
    seed_log: Path,
    base: str,
    steps: int | None,
    merge: bool,
    packaging: Packaging,
    progress: Progress,
) -> None:
    """The model, the adapter, or both merged, as `replay_seed_log` rebuilds them.

    Raises:
        DataError: log or base model are damaged or not those of the run, or the adapter cannot be merged.
        UsageError: the log has fewer than `steps` steps.
    """
    loaded, num_steps = replay_seed_log(config, seed_log, base=base, steps=steps, progress=progress)
    model = config.model.model_copy(update={"path": base})
    config = config.model_copy(update={"model": model})
    if merge and loaded.four_bits is not None:
        with TemporaryDirectory() as folder:
            save_model(loaded.model, loaded.tokenizer, Path(folder))
            loaded = _load_to_merge(config, weights=Path(folder))
    _save(config, directory, loaded, merge=merge, run=seed_log.parent, step=num_steps, packaging=packaging, replay=True)


def _load_to_merge(config: RunConfig, *, weights: Path) -> LoadedModel:
    """The saved adapter on a base that is not quantised; one that is stored in 4 bits is decoded."""
    whole = config.model.model_copy(update={"quantization": None})
    loaded = load_whole_model(config.model_copy(update={"model": whole}), weights=weights, decoded=True)
    if loaded.four_bits is not None:
        _log.info("the adapter is merged into the values that the 4 bits of %s stand for", config.model.path)
    elif config.model.quantization is not None:
        _log.warning("the adapter was trained on quantised weights, and is merged into those they were made from")
    return loaded


def _save(
    config: RunConfig,
    directory: Path,
    loaded: LoadedModel,
    *,
    merge: bool,
    run: Path,
    step: int,
    packaging: Packaging,
    replay: bool = False,
) -> None:
    model, facts = loaded.model, {"rebuilt from the seed log": f"{step} steps"} if replay else {}
    if merge:
        model, check = merge_adapter(model, dtype=packaging.dtype)
        _log.info("merged: %s", check)
        facts["merged"] = str(check)
    elif packaging.dtype is not None:
        cast(model, packaging.dtype)
    save_model(model, loaded.tokenizer, directory, max_shard_size=packaging.max_shard_size)
    write_model_card(directory, build_card(config, run=run, step=step, facts=facts))
