"""The `method` section: which estimator computes the step's direction, and how."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from vamo_ft.config.period import Period
from vamo_ft.config.section import Section

Difference = Literal["central", "forward"]


class DirectionsConfig(Section):
    """The distribution of perturbation directions."""

    distribution: Literal["rademacher", "gaussian", "sphere"] = Field(
        "rademacher",
        description="law of a direction's elements; all have unit RMS per coordinate: rademacher (random signs), "
        "gaussian (MeZO's choice), sphere (gaussian rescaled to norm sqrt(d))",
    )
    structure: Literal["full"] = Field(
        "full", description="which coordinates are perturbed: full (every trainable one)"
    )


class FirstOrderConfig(Section):
    """Back-propagation. `sgd`, `adamw` and `adagrad` also choose the optimizer of that name."""

    name: Literal["first_order", "sgd", "adamw", "adagrad"] = Field(
        description="the method; 'vamo-ft methods' lists them"
    )


class SpsaConfig(Section):
    """Zeroth-order estimate from loss differences (SPSA). `mezo` also chooses gaussian directions and plain SGD."""

    name: Literal["spsa", "mezo"] = Field(description="the method; 'vamo-ft methods' lists them")
    probes: int = Field(1, ge=1, description="q, directions per step; 2q (central) or q+1 (forward) forward passes")
    eps: float = Field(
        1e-3,
        gt=0,
        description="perturbation per coordinate; the distance moved is eps*sqrt(d). A paper's radius mu along a unit "
        "vector is eps*sqrt(d). mezo with an adapter: 1e-2",
    )
    difference: Difference = Field("central", description="central: error O(eps^2); forward: error O(eps), q+1 passes")
    directions: DirectionsConfig = DirectionsConfig()


class SubsetConfig(Section):
    """A snapshot over a part of the data."""

    subset: int = Field(gt=0, description="samples whose mean stands for the mean over all; at least 8 * every * batch")


class SnapshotConfig(Section):
    """When the reference point of the correction is taken anew, and over which samples."""

    every: Period = Field(Period(1, "epoch"), description="period in epochs or steps")
    set: Literal["all"] | SubsetConfig = Field("all", description="all samples, or {subset: M}")

    @model_validator(mode="after")
    def _subset_needs_steps(self) -> "SnapshotConfig":
        if self.set != "all" and self.every.unit != "step":
            raise ValueError("every: a snapshot over a subset needs its period in steps, such as '16 steps'")
        return self


class VamoConfig(Section):
    """VAMO: the mini-batch gradient, corrected by zeroth-order probes of a snapshot (arXiv 2505.13954)."""

    name: Literal["vamo"] = Field(description="the method; 'vamo-ft methods' lists them")
    probes: int = Field(1, ge=1, description="q, directions per snapshot; 2q (central) or q+1 (forward) forward passes")
    eps: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="perturbation per coordinate (the distance moved is eps*sqrt(d)), or auto: of five values the one "
        "whose derivatives agree best with back-propagation on one micro-batch",
    )
    alpha: float = Field(
        1.0,
        ge=0,
        description="coefficient of the projected correction; 1 is the theory's value and equals the paper's alpha q/d",
    )
    difference: Difference = Field("central", description="central: error O(eps^2), 2q passes; forward: O(eps), q+1")
    directions: DirectionsConfig = DirectionsConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    source: Literal["table", "recompute"] = Field(
        "table",
        description="table: keep the snapshot's per-sample derivatives, 4nq bytes; recompute: keep a copy of the "
        "parameters and evaluate the batch there in every step",
    )
    orthogonalise: bool = Field(
        True, description="project on the span of the directions; false gives the raw sum, which over-corrects"
    )
    normaliser: Literal["data", "batch"] = Field(
        "data", description="divide the batch term by the data's mean token count (unbiased), or by the batch's own"
    )


MethodConfig = Annotated[FirstOrderConfig | SpsaConfig | VamoConfig, Field(discriminator="name")]

METHOD_NAMES: tuple[str, ...] = tuple(
    name
    for section in (FirstOrderConfig, SpsaConfig, VamoConfig)
    for name in get_args(section.model_fields["name"].annotation)
)
"""Every value that `method.name` takes."""
