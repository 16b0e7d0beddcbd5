"""The `compare` section: which methods are compared, at what budget. `vamo-ft train` takes no notice of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from vamo_ft.config.budget import Budget
from vamo_ft.config.section import Section

__all__ = ["CompareConfig", "ComparedConfig", "Seed", "Seeds", "check_tuning_seed"]


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("the same seed twice is the same run")
    return seeds


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[list[Seed], AfterValidator(_different)]

_GIVEN = (
    "compare",
    "run",
    "data",
    "evaluation",
    "logging",
    "optimizer.learning_rate",
    "training.steps",
    "training.epochs",
)
"""What is the same for all methods, or decided by the comparison."""


class ComparedConfig(Section):
    """One method of the comparison."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        [],
        description="candidates, of which the best on the tuning seed is taken; empty: a third, one and three times "
        "the file's own learning rate, or that of the method's starter configuration",
    )
    set: dict[str, Any] = Field(
        {},
        description="keys that differ from the file's, such as method.probes: 4; with method.name two forms of a "
        "method can be compared under names of their own",
    )

    @field_validator("set")
    @classmethod
    def _keys_are_the_methods_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        flat = dict(_flattened(value))
        for key in flat:
            if any(f"{key}.".startswith(f"{given}.") for given in _GIVEN):
                raise ValueError(f"{key}: is the same for all methods, or decided by the comparison; leave it out")
        return flat

    @field_validator("learning_rates")
    @classmethod
    def _candidates_differ(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("the same learning rate twice is the same run")
        return sorted(value)


class CompareConfig(Section):
    """A comparison of methods at equal budget (`vamo-ft compare`); `vamo-ft train` takes no notice of it."""

    budget: Budget = Field(
        description="of each run, such as '20000 evaluations' (forward + 2 x backward samples), '3e14 flops', "
        "'100k tokens' (forward + 2 x backward) or '600 seconds'; or --budget"
    )
    seeds: Seeds = Field(
        [1, 2, 3],
        min_length=1,
        max_length=20,
        description="seeds of the runs that are reported; a number N stands for 1 to N",
    )
    tuning_seed: Seed = Field(0, description="seed of the runs that choose learning rates; none of seeds")
    metric: str | None = Field(
        None, description="one of evaluation.metrics; null: the first of them that is a score, else loss"
    )
    points: int = Field(10, ge=1, description="evaluations within each run that is reported")
    methods: dict[str, ComparedConfig] = Field(
        min_length=1,
        description="what is compared: names of methods, or names of your own with method.name in set; or --methods",
    )

    @field_validator("metric")
    @classmethod
    def _metric_is_a_mean(cls, value: str | None) -> str | None:
        if value == "perplexity":
            raise ValueError("perplexity is the exponential of loss, with the same order of methods; write loss")
        return value

    @field_validator("seeds", mode="before")
    @classmethod
    def _a_number_of_seeds(cls, value: Any) -> Any:
        counted = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1000
        return list(range(1, value + 1)) if counted else value

    @field_validator("methods", mode="before")
    @classmethod
    def _nothing_more_to_say(cls, value: Any) -> Any:
        return {key: {} if arm is None else arm for key, arm in value.items()} if isinstance(value, dict) else value

    @field_validator("methods")
    @classmethod
    def _labels_are_folder_names(cls, value: dict[str, ComparedConfig]) -> dict[str, ComparedConfig]:
        for label in value:
            if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label) is None:
                raise ValueError(f"{label}: must be letters, digits, '.', '_' and '-', a letter or digit first")
        return value

    @model_validator(mode="after")
    def _tuning_is_apart(self) -> "CompareConfig":
        check_tuning_seed(self.tuning_seed, self.seeds)
        return self


def check_tuning_seed(seed: int, seeds: Sequence[int]) -> None:
    """Refuses one whose run is reported too."""
    if seed in seeds:
        raise ValueError(f"tuning_seed: {seed} is one of seeds, whose results it would favour")


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
