"""`200 steps`, `1 epoch`: how often something happens."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_PATTERN = re.compile(r"(\d+)\s*(step|epoch)s?")


@dataclass(frozen=True, slots=True)
class Period:
    """A positive number of steps or of epochs, written `200 steps` or `1 epoch`."""

    count: int
    unit: Literal["step", "epoch"]

    @classmethod
    def parse(cls, value: Any) -> "Period":
        """Reads the written form.

        Raises:
            ValueError: it is not a positive whole number and a unit.
        """
        if isinstance(value, Period):
            return value
        match = _PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None or int(match[1]) == 0:
            raise ValueError(f"must be a whole number above 0 and a unit, such as '200 steps', not {value!r}")
        return cls(int(match[1]), "step" if match[2] == "step" else "epoch")

    def __str__(self) -> str:
        return f"{self.count} {self.unit}{'' if self.count == 1 else 's'}"

    def passed(self, step: int, *, batch_size: int, num_samples: int) -> int:
        """Whole periods that lie before `step` steps, the samples of which run on across epochs."""
        if self.unit == "step":
            return step // self.count
        return step * batch_size // (num_samples * self.count)

    def due(self, step: int, *, batch_size: int, num_samples: int) -> bool:
        """Whether a period ends with step number `step` (counted from 1); never at 0."""
        if step == 0:
            return False
        sizes = {"batch_size": batch_size, "num_samples": num_samples}
        return self.passed(step, **sizes) > self.passed(step - 1, **sizes)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": _PATTERN.pattern}
