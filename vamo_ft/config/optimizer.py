"""The `optimizer` section: what moves the parameters along an estimate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vamo_ft.config.section import Section


class OptimizerConfig(Section):
    """The update rule."""

    name: Literal["sgd", "adamw", "adagrad", "sign_sgd"] = Field(
        description="torch.optim's rule of that name, or sign_sgd: x <- (1 - lr wd) x - lr sign(g)"
    )
    learning_rate: float = Field(gt=0, description="peak learning rate; it has no default")
    weight_decay: float = Field(0.0, ge=0, description="decay coefficient, not applied to biases and norms")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum coefficient")
    nesterov: bool = Field(False, description="sgd: Nesterov momentum")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), strict=False, description="adamw: decay rates of the two moments"
    )
    eps: float | None = Field(None, gt=0, description="adamw, adagrad: added to the denominator; torch's default")

    @model_validator(mode="after")
    def _keys_belong_to_rule(self) -> "OptimizerConfig":
        owners = {"momentum": {"sgd"}, "nesterov": {"sgd"}, "betas": {"adamw"}, "eps": {"adamw", "adagrad"}}
        for key, owner in owners.items():
            if self.name not in owner and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {self.name} has no such setting ({' and '.join(sorted(owner))} only)")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: needs momentum above 0")
        return self
