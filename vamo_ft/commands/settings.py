"""What a command knows before any heavy library is loaded: its configuration, and whether it may use the network."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path

from vamo_ft.config.budget import Budget
from vamo_ft.config.load import LoadedConfig, load_config
from vamo_ft.config.model import AdapterConfig, ModelConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError

__all__ = ["Subject", "find_run", "find_seed_log", "find_subject", "load_comparison", "load_settings"]


def load_settings(config_path: Path, *, overrides: Sequence[str]) -> RunConfig:
    """The configuration; `run.offline` is made known to the Hugging Face libraries, which read it when imported.

    Raises:
        ConfigError: with every problem found.
        UsageError: there is no room for temporary files, which those libraries ask for when imported.
    """
    return _made_known(load_config(config_path, overrides=overrides)).config


def load_comparison(
    config_path: Path,
    *,
    overrides: Sequence[str],
    methods: str | None,
    budget: str | None,
    seeds: str | None,
    rates: Sequence[str],
) -> LoadedConfig:
    """The configuration with its `compare` section, to which the options add.

    Args:
        methods: labels, separated by commas.
        budget: as `compare.budget`.
        seeds: a number, or seeds separated by commas.
        rates: `LABEL=A,B`.

    Raises:
        ConfigError: with every problem found.
        UsageError: an option cannot be read.
    """
    added = list(overrides)
    if budget is not None:
        try:
            Budget.parse(budget)
        except ValueError as error:
            raise UsageError(f"--budget: {error}") from None
        added.append(f"compare.budget={budget}")
    if seeds is not None:
        listed = [seed.strip() for seed in seeds.split(",")]
        if not all(map(str.isdecimal, listed)) or listed == ["0"]:
            raise UsageError(f"--seeds {seeds}: write how many, such as 5, or the seeds themselves, such as 1,2,3")
        added.append(f"compare.seeds={f'[{seeds}]' if len(listed) > 1 else seeds}")
    labels = [] if methods is None else [label.strip() for label in methods.split(",")]
    if methods is not None and not all(labels):
        raise UsageError(f"--methods {methods}: write names separated by commas, such as vamo,mezo")
    for item in rates:
        label, equals, values = item.partition("=")
        if not (label and equals and values) or "." in label:
            raise UsageError(f"--learning-rates {item}: write it as METHOD=A,B, such as mezo=1e-5,1e-4")
        if labels and label not in labels:
            raise UsageError(f"--learning-rates {item}: {label} is none of --methods {methods}")
        added.append(f"compare.methods.{label}.learning_rates=[{values}]")
    return _made_known(load_config(config_path, overrides=added, methods=labels))


def _made_known(loaded: LoadedConfig) -> LoadedConfig:
    try:
        tempfile.gettempdir()  # remembered, so that a disk that fills from here on does not matter
    except FileNotFoundError as error:
        raise UsageError(f"{error.strerror}: make room there, or name a folder in the variable TMPDIR") from None
    if loaded.config.run.offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    return loaded


def find_run(target: Path) -> tuple[Path, Path]:
    """The configuration file and the model folder that a run directory, or a checkpoint in one, stands for.

    Raises:
        UsageError: it is neither, or the run has no final model.
    """
    model = target / "model"
    for run in (target, target.parent.parent):
        if model.is_dir() and (run / "config.yaml").is_file():
            return run / "config.yaml", model
    if (target / "config.yaml").is_file():
        checkpoints = sorted((target / "checkpoints").glob("step-*"))
        newest = f", such as {checkpoints[-1]}" if checkpoints else ", once there is one"
        raise UsageError(f"{target}: this run has no final model yet; name one of its checkpoints{newest}")
    if not target.is_dir():
        raise UsageError(f"{target}: no such folder; name a run directory or a checkpoint in one")
    if target.name == "model" and (target.parent / "metrics.jsonl").is_file():
        raise UsageError(f"{target}: this is the model in a run directory; name {target.parent}")
    raise UsageError(f"{target}: neither a run directory nor a checkpoint in one")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to look at.

    Attributes:
        model: how it is loaded.
        weights: folder whose values replace those of `model`; None: there is none.
        run: the run that it comes from; None: from elsewhere.
    """

    model: ModelConfig
    weights: Path | None
    run: RunConfig | None


def find_subject(target: str, *, overrides: Sequence[str]) -> Subject:
    """What a run directory, a checkpoint, the folder of a model or an adapter, or a Hub id stands for.

    Raises:
        UsageError: a run has no model yet, or an adapter does not say which model it belongs to.
        ConfigError: the run's configuration, with `overrides`, is not valid.
    """
    folder = Path(target)
    if isfile(folder / "config.yaml") or isdir(folder / "model"):  # unlike Path's, false for a name that is too long
        file, weights = find_run(folder)
        run = load_settings(file, overrides=overrides)
        return Subject(run.model, weights, run)
    if overrides:
        raise UsageError(f"--set: {target} is not a run, and has no settings to override")
    if not isfile(folder / "adapter_config.json"):
        return Subject(ModelConfig(path=target), None, None)
    try:
        base = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UsageError(f"{target}: its adapter_config.json does not name the base model (base_model_name_or_path)")
    return Subject(ModelConfig(path=base, adapter=AdapterConfig(type="lora")), folder, None)


def find_seed_log(target: Path) -> tuple[Path, Path]:
    """The configuration file and the seed log of a run directory.

    Raises:
        UsageError: it is none, or its run wrote no seed log.
    """
    config, log = target / "config.yaml", target / "seedlog.bin"
    if not config.is_file():
        raise UsageError(f"{target}: is not a run directory: it has no config.yaml")
    if not log.is_file():
        raise UsageError(
            f"{target}: has no seedlog.bin; zeroth-order runs with plain sgd write one (the model itself is exported "
            "without --from-seedlog)"
        )
    return config, log
