"""`vamo-ft validate`: every key of a configuration, and where its value comes from."""

import sys
from collections.abc import Iterator, Sequence
from os.path import exists
from pathlib import Path

from vamo_ft.config.load import load_config, resolved_values
from vamo_ft.config.schema import RunConfig
from vamo_ft.config.yaml_text import write_yaml_value

__all__ = ["config_warnings", "validate"]

_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gguf")
_WIDEST_VALUE = 32  # longer values push only their own comment to the right


def validate(config_path: Path, *, overrides: Sequence[str]) -> None:
    """Prints the resolved configuration, one value a line, and warnings on standard error.

    Raises:
        ConfigError: with every problem found.
    """
    loaded = load_config(config_path, overrides=overrides)
    values = {key: write_yaml_value(value) for key, value in resolved_values(loaded.config).items()}
    key_width = max(map(len, values))
    value_width = min(_WIDEST_VALUE, max(map(len, values.values())))
    for key, value in values.items():
        print(f"{key:<{key_width}}  {value:<{value_width}}  # {loaded.sources[key]}")
    for warning in config_warnings(loaded.config):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{config_path} is valid")


def config_warnings(config: RunConfig) -> Iterator[str]:
    """What is allowed and yet hardly meant."""
    if config.evaluation.every is not None and config.data.evaluation is None:
        yield "evaluation.every: has no effect without data.evaluation"
    if config.training.steps is not None and config.schedule.warmup_steps >= config.training.steps:
        yield f"schedule.warmup_steps: the run's {config.training.steps} steps end within the warm-up"
    paths = {"model.path": config.model.path}
    several = len(config.data.training_sets) > 1
    for number, data_set in enumerate(config.data.training_sets):
        paths[f"data.train.{number}.path" if several else "data.train.path"] = data_set.path
    if config.data.evaluation is not None:
        paths["data.evaluation.path"] = config.data.evaluation.path
    for key, path in paths.items():
        is_local = path.startswith((".", "/")) or path.endswith(_FILE_SUFFIXES)
        if is_local and not exists(path):
            yield f"{key}: {path} does not exist (relative paths start in the working directory)"
