"""The `method` section: which estimator computes the step's direction, and how."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from vamo_ft.config.period import Period
from vamo_ft.config.section import Section

Difference = Literal["central", "forward"]
Structure = Literal["full", "block", "low_rank", "subspace", "sparse"]

STRUCTURES: Mapping[str, tuple[Structure, ...]] = {"spsa": get_args(Structure), "vamo": ("full",)}
"""Estimator -> the structures of directions that it takes."""

OPTIMIZERS: Mapping[str, str] = {
    "sgd": "sgd",
    "adamw": "adamw",
    "adagrad": "adagrad",
    "zo_adam": "adamw",
    "zo_sign": "sign_sgd",
    "zo_momentum": "sgd",
}
"""Method -> the optimizer that its name stands for; the other methods go with any."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "block": {"order": "random_permutation"},
    "low_rank": {"rank": 2, "refresh_every": 50},
    "subspace": {"rank": 24, "refresh_every": 1000},
    "sparse": {"quantile": 0.25},
}
"""Structure -> the keys that belong to it."""

_STRUCTURE_OF: Mapping[str, Structure] = {
    "mezo_bcd": "block",
    "lozo": "low_rank",
    "subzero": "subspace",
    "sparse_mezo": "sparse",
}


class DirectionsConfig(Section):
    """The law of perturbation directions."""

    distribution: Literal["rademacher", "gaussian", "sphere"] = Field(
        "rademacher",
        description="law of a direction's elements; all have unit RMS per coordinate: rademacher (random signs), "
        "gaussian (MeZO's choice), sphere (gaussian rescaled to norm sqrt(d); full only)",
    )
    structure: Structure = Field(
        "full",
        description="which coordinates are perturbed, and how: full (every trainable one), block (one decoder layer, "
        "embedding, norm or head a step), low_rank (matrices U V^T), subspace (matrices U Z V^T with orthonormal U "
        "and V), sparse (the smaller weights of each tensor)",
    )
    order: Literal["random_permutation", "cyclic", "random", "flip_flop"] | None = Field(
        None,
        description="block: the order of the blocks: random_permutation (each once a cycle), cyclic, random (drawn "
        "anew), flip_flop (up, then down)",
    )
    rank: int | None = Field(None, ge=1, description="low_rank (2), subspace (24): columns of U and V")
    refresh_every: int | None = Field(
        None, ge=1, description="steps that V (low_rank: 50), or U and V (subspace: 1000), are kept for"
    )
    quantile: float | None = Field(
        None, gt=0, lt=1, description="sparse: share of each tensor's elements, the smallest ones, that is perturbed"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_structure(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(structure := values.get("structure"), str):
            return values
        return {**_DEFAULTS.get(structure, {}), **{key: value for key, value in values.items() if value is not None}}

    @model_validator(mode="after")
    def _keys_belong_to_structure(self) -> "DirectionsConfig":
        for key in ("order", "rank", "refresh_every", "quantile"):
            owners = [structure for structure, defaults in _DEFAULTS.items() if key in defaults]
            if getattr(self, key) is not None and self.structure not in owners:
                raise ValueError(f"{key}: {self.structure} has no such setting ({' and '.join(owners)} only)")
        if self.distribution == "sphere" and self.structure != "full":
            raise ValueError(
                f"distribution: sphere fixes the norm of the whole direction, and goes with structure: full; write "
                f"gaussian for {self.structure}"
            )
        return self


class FirstOrderConfig(Section):
    """Back-propagation. `sgd`, `adamw` and `adagrad` also choose the optimizer of that name."""

    name: Literal["first_order", "sgd", "adamw", "adagrad"] = Field(
        description="the method; 'vamo-ft methods' lists them"
    )


class SpsaConfig(Section):
    """Zeroth-order estimate from loss differences (SPSA); other names also choose directions and optimizer."""

    name: Literal["spsa", "mezo", "mezo_bcd", "lozo", "subzero", "sparse_mezo", "zo_adam", "zo_sign", "zo_momentum"] = (
        Field(description="the method; 'vamo-ft methods' lists them")
    )
    probes: int = Field(1, ge=1, description="q, directions per step; 2q (central) or q+1 (forward) forward passes")
    eps: float = Field(
        1e-3,
        gt=0,
        description="perturbation per coordinate; the distance moved is eps*sqrt(d). A paper's radius mu along a unit "
        "vector is eps*sqrt(d). With an adapter all but spsa preset 1e-2",
    )
    difference: Difference = Field("central", description="central: error O(eps^2); forward: error O(eps), q+1 passes")
    directions: DirectionsConfig = DirectionsConfig()

    @model_validator(mode="after")
    def _structure_fits(self) -> "SpsaConfig":
        _check_structure("spsa", self.directions)
        if self.directions.structure != _STRUCTURE_OF.get(self.name, self.directions.structure):
            raise ValueError(
                f"directions.structure: {self.directions.structure} contradicts name: {self.name}; leave it out, or "
                "write name: mezo"
            )
        return self


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

    @model_validator(mode="after")
    def _structure_fits(self) -> "VamoConfig":
        _check_structure("vamo", self.directions)
        return self


MethodConfig = Annotated[FirstOrderConfig | SpsaConfig | VamoConfig, Field(discriminator="name")]

METHOD_NAMES: tuple[str, ...] = tuple(
    name
    for section in (FirstOrderConfig, SpsaConfig, VamoConfig)
    for name in get_args(section.model_fields["name"].annotation)
)
"""Every value that `method.name` takes."""


def _check_structure(estimator: str, directions: DirectionsConfig) -> None:
    allowed = STRUCTURES[estimator]
    if directions.structure not in allowed:
        able = [name for name, structures in STRUCTURES.items() if directions.structure in structures]
        raise ValueError(
            f"directions.structure: {estimator} takes {' or '.join(allowed)}, not {directions.structure}; leave it "
            f"out, or write name: {' or '.join(able)}"
        )
