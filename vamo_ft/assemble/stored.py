"""Runs on a base whose files hold quantised weights, without a word of it in the configuration."""

from pydantic import ValidationError

from vamo_ft.config.model import ModelConfig
from vamo_ft.config.problems import find_problems
from vamo_ft.config.schema import RunConfig
from vamo_ft.config.yaml_text import dotted
from vamo_ft.core.errors import DataError
from vamo_ft.models.four_bits import FourBits

__all__ = ["as_stored", "why_not_stored"]


def as_stored(config: RunConfig, held: FourBits | None) -> RunConfig:
    """The configuration with `model.quantization` as the base's files have it.

    Args:
        held: of the model that was loaded, or outlined.

    Raises:
        DataError: what the configuration asks for does not go with it.
    """
    if held is None or not held.stored or config.model.quantization is not None:
        return config
    path = config.model.path
    if config.model.adapter is None:
        raise DataError(
            f"model.path: {path}: its weights are stored in 4 bits, and quantised weights are not trained; add "
            "model.adapter, or write the model that they were made from"
        )
    if (reason := why_not_stored(config, held)) is not None:
        raise DataError(
            f"model.path: {path}: its weights are stored in 4 bits, which counts as model.quantization; {reason}, or "
            "write the model that they were made from"
        )
    return config.model_copy(update={"model": _model(config, held)})


def why_not_stored(config: RunConfig, held: FourBits) -> str | None:
    """What of a configuration with an adapter does not go with such a base; None: all of it does."""
    try:
        RunConfig.model_validate(config.model_copy(update={"model": _model(config, held)}).model_dump())
    except ValidationError as error:
        problem = find_problems(error, schema=RunConfig)[0]
        return f"{dotted(problem.path)}: {problem.text}" if problem.path else problem.text
    return None


def _model(config: RunConfig, held: FourBits) -> ModelConfig:
    return config.model.model_copy(update={"quantization": held.config})
