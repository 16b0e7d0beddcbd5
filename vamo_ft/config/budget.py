"""`20000 evaluations`, `3e14 flops`: how much a run may spend."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

__all__ = ["Budget", "Currency"]

Currency = Literal["evaluations", "flops", "tokens", "seconds"]

_PATTERN = re.compile(
    r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([kMGTP]?)\s*(evaluation|flop|token|second)s?", re.IGNORECASE
)
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_CURRENCIES: dict[str, Currency] = {
    "evaluation": "evaluations",
    "flop": "flops",
    "token": "tokens",
    "second": "seconds",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """An amount above 0 and its currency, written `20000 evaluations`, `3e14 flops`, `100k tokens` or `600 seconds`.

    Evaluations are samples of forward passes and twice those of backward passes; tokens are their input tokens, counted
    likewise; FLOPs are the ledger's; seconds are those of training, without evaluation and saving.
    """

    amount: float
    currency: Currency

    @classmethod
    def parse(cls, value: Any) -> "Budget":
        """Reads the written form.

        Raises:
            ValueError: it is not a positive number and a currency.
        """
        if isinstance(value, Budget):
            return value
        match = _PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
        amount = float(match[1]) * _FACTORS[match[2].lower()] if match is not None else 0.0
        if match is None or not 0 < amount < float("inf"):
            raise ValueError(
                "must be a number above 0 and a currency, such as '20000 evaluations', '3e14 flops', '100k tokens' or "
                f"'600 seconds', not {value!r}"
            )
        return cls(amount, _CURRENCIES[match[3].lower()])

    def __str__(self) -> str:
        return f"{self.amount:.12g} {self.currency}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": _PATTERN.pattern}
