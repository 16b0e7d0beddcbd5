"""The `method.snapshot` section: when and over which samples a reference point is taken."""

from typing import Literal

from pydantic import Field, model_validator

from vamo_ft.config.period import Period
from vamo_ft.config.section import Section


class SubsetConfig(Section):
    """A snapshot over a part of the data."""

    subset: int = Field(gt=0, description="samples whose mean stands for the mean over all; at least 8 * every * batch")


class SnapshotConfig(Section):
    """When the reference point of the correction is taken anew, and over which samples."""

    every: Period = Field(Period(1, "epoch"), description="period in epochs or steps")
    set: Literal["all"] | SubsetConfig = Field("all", description="all samples, or {subset: M}")
    offload: bool = Field(
        False,
        description="keep what snapshots hold of the trained parameters' size (a copy of them, a full gradient, the "
        "sketch and basis of gradient_subspace) in host memory, and bring it to the device tensor by tensor",
    )

    @property
    def subset(self) -> int | None:
        """Samples whose mean stands for the mean over all; None: all of them."""
        return None if self.set == "all" else self.set.subset

    @model_validator(mode="after")
    def _subset_needs_steps(self) -> "SnapshotConfig":
        if self.set != "all" and self.every.unit != "step":
            raise ValueError("every: a snapshot over a subset needs its period in steps, such as '16 steps'")
        return self


class RefreshedSnapshotConfig(SnapshotConfig):
    """When the reference point of the correction is taken anew, at fixed times or by need, and over which samples."""

    refresh: Literal["periodic", "adaptive"] = Field(
        "periodic",
        description="periodic: a new snapshot every period; adaptive: at the end of a period, where the correlation of "
        "the old one with the gradients is below min_correlation and the budget allows",
    )
    min_correlation: float = Field(0.3, gt=0, lt=1, description="adaptive: correlation below which it is replaced")
    budget: float = Field(
        1.0, gt=0, description="adaptive: forward passes that snapshots may take for each one of training"
    )

    @model_validator(mode="after")
    def _keys_belong_to_refresh(self) -> "RefreshedSnapshotConfig":
        for key in ("min_correlation", "budget"):
            if self.refresh == "periodic" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: periodic refresh has no such setting; leave it out, or write refresh: adaptive"
                )
        return self
