"""From a run's file and its `compare` section to a configuration for each method."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vamo_ft.config.comparison import ComparedConfig
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.config.presets import with_presets
from vamo_ft.config.schema import RunConfig
from vamo_ft.config.starters import STARTERS

__all__ = ["Arm", "arm_values", "candidates"]

_GRID = (1 / 3, 1.0, 3.0)


@dataclass(frozen=True, slots=True)
class Arm:
    """One method, as it is compared.

    Attributes:
        label: its name in tables and of its runs.
        config: of a run, with the first of the learning rates, and the file's own length and seed.
        learning_rates: that are tried, ascending.
    """

    label: str
    config: RunConfig
    learning_rates: tuple[float, ...]


def candidates(raw: Mapping[str, Any], label: str, arm: ComparedConfig) -> tuple[float, ...]:
    """The learning rates that a method tries.

    Args:
        raw: the file's values before presets.

    Raises:
        ValueError: they are neither written nor known.
    """
    if arm.learning_rates:
        return tuple(arm.learning_rates)
    name = _method_name(label, arm)
    middle = raw["optimizer"]["learning_rate"]
    if name != raw["method"]["name"]:
        starter = STARTERS[name]
        if starter.adapter != (raw["model"].get("adapter") is not None):
            trained = "the weights" if starter.adapter else "an adapter"
            raise ValueError(f"learning_rates: there are no customary ones of {name} for {trained}; write some")
        middle = starter.learning_rate
    return tuple(float(f"{factor * middle:.2g}") if factor != 1 else middle for factor in _GRID)


def arm_values(raw: Mapping[str, Any], label: str, arm: ComparedConfig, *, learning_rate: float) -> dict[str, Any]:
    """The values of a run's file for one method, presets included.

    The file's own method keeps all of the file. Another one begins with the method section and the optimizer of its
    starter configuration (`vamo-ft init`), clips as its name presets, and shares everything else; where the name
    presets a perturbation, that is taken. What `set` says wins.

    Args:
        raw: the file's values before presets.

    Raises:
        ValueError: the method is not named.
    """
    values = {key: copy.deepcopy(value) for key, value in raw.items() if key != "compare"}
    name = _method_name(label, arm)
    if name != values["method"]["name"]:
        starter = STARTERS[name]
        values["method"] = {"name": name, **{key: value for key, value in starter.method.items() if key != "eps"}}
        values["optimizer"] = {"name": starter.optimizer}
        values["training"].pop("max_grad_norm", None)
    values["optimizer"]["learning_rate"] = learning_rate
    for key, value in arm.set.items():
        _put(values, key, value)
    return with_presets(values)


def _method_name(label: str, arm: ComparedConfig) -> str:
    name = arm.set.get("method.name", label)
    if name not in METHOD_NAMES:
        raise ValueError(
            f"{name}: no such method; choose one of {', '.join(METHOD_NAMES)}"
            if "method.name" in arm.set
            else "is not the name of a method; say which one it is as method.name in set"
        )
    return str(name)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    section = values
    for part in path:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[last] = value
