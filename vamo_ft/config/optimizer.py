"""The `optimizer` section: the update rule, and in which precision it keeps what."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vamo_ft.config.section import Section

BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
"""Optimizers that need another package."""

PAGED: Mapping[str, str] = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw"}
"""Optimizer whose moments may leave the device, as CUDA can do it -> the one whose moments stay."""

RULES: Mapping[str, str] = {
    **{name: name for name in ("sgd", "adamw", "adagrad", "sign_sgd")},
    **dict.fromkeys(BITSANDBYTES, "adamw"),
}
"""Optimizer -> the rule that it is a form of."""


class OptimizerConfig(Section):
    """The update rule."""

    name: Literal["sgd", "adamw", "adagrad", "sign_sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        description="torch.optim's rule of that name; sign_sgd: x <- (1 - lr wd) x - lr sign(g); adamw_8bit, "
        "paged_adamw_8bit, paged_adamw_32bit: AdamW with moments of 8 bits, or with moments that may move to host "
        "memory, on CUDA (needs bitsandbytes)"
    )
    learning_rate: float = Field(gt=0, description="peak learning rate; it has no default")
    weight_decay: float = Field(0.0, ge=0, description="decay coefficient, not applied to biases and norms")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum coefficient")
    nesterov: bool = Field(False, description="sgd: Nesterov momentum")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), strict=False, description="adamw: decay rates of the two moments"
    )
    eps: float | None = Field(None, gt=0, description="adamw, adagrad: added to the denominator; torch's default")
    master_weights: bool = Field(
        False,
        description="keep float32 values of bfloat16 weights between the steps, 4 bytes an element, and train those; "
        "false: the weights themselves are stepped in float32 and rounded stochastically",
    )

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step is a multiple of the gradient, so that a projected one need not be formed."""
        return self.name == "sgd" and self.momentum == 0

    @model_validator(mode="after")
    def _keys_belong_to_rule(self) -> "OptimizerConfig":
        owners = {"momentum": {"sgd"}, "nesterov": {"sgd"}, "betas": {"adamw"}, "eps": {"adamw", "adagrad"}}
        for key, owner in owners.items():
            if RULES[self.name] not in owner and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {self.name} has no such setting ({' and '.join(sorted(owner))} only)")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: needs momentum above 0")
        return self
