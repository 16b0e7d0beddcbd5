"""The configuration of other methods on the same model and data, for figures side by side."""

from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from vamo_ft.config.arms import arm_values
from vamo_ft.config.comparison import ComparedConfig
from vamo_ft.config.errors import ConfigError
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.config.schema import RunConfig

__all__ = ["other_methods"]


def other_methods(config: RunConfig, names: Iterable[str] | None) -> tuple[dict[str, RunConfig], Mapping[str, str]]:
    """Each method as `vamo-ft init` begins with it, on the rest of the configuration.

    Args:
        names: None: every method but the configured one.

    Returns:
        name -> configuration, and name -> why it does not go with this configuration.

    Raises:
        ConfigError: a name is no method's.
    """
    if names is not None and (unknown := [name for name in names if name not in METHOD_NAMES]):
        raise ConfigError([f"--methods {unknown[0]}: no such method; choose from {', '.join(METHOD_NAMES)}"])
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"compare"})
    found: dict[str, RunConfig] = {}
    refused: dict[str, str] = {}
    for name in METHOD_NAMES if names is None else names:
        if name == config.method.name:
            continue
        try:
            raw = arm_values(values, name, ComparedConfig(), learning_rate=config.optimizer.learning_rate)
            found[name] = RunConfig.model_validate(raw)
        except ValidationError as error:
            message = str(error.errors()[0]["msg"])
            refused[name] = message.removeprefix("Value error, ").partition(";")[0]
    return found, refused
