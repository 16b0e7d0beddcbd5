"""A small valid configuration, and one for each method."""

from pathlib import Path

from vamo_ft.config.errors import ConfigError
from vamo_ft.config.load import LoadedConfig, load_config

VALID = """\
run:
  name: demo
model:
  path: some/model
data:
  train: {path: train.jsonl}
  format:
    type: prompt_completion
method:
  name: vamo
optimizer:
  name: adamw
  learning_rate: 1e-3
training:
  steps: 10
"""

REQUIRED = {"addax": ["method.boundary=64"], "vamo_literal": ["method.radius=0.5"]}
"""Method -> keys without a default."""


def load_text(text: str, *overrides: str) -> LoadedConfig:
    """Loads `text` as config.yaml in the working directory."""
    Path("config.yaml").write_text(text, encoding="utf-8")
    return load_config(Path("config.yaml"), overrides=overrides)


def problems_of(text: str, *overrides: str) -> list[str]:
    """What is wrong with it."""
    try:
        load_text(text, *overrides)
    except ConfigError as error:
        return list(error.problems)
    return []
