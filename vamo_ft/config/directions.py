"""The `method.directions` section: the law of perturbation directions, and what they reach."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from vamo_ft.config.section import Section

Structure = Literal["full", "block", "low_rank", "subspace", "sparse", "gradient_subspace"]

STRUCTURES: Mapping[str, tuple[Structure, ...]] = {
    "spsa": ("full", "block", "low_rank", "subspace", "sparse"),
    "vamo": ("full", "gradient_subspace"),
    "addax": ("full", "block", "low_rank", "subspace"),
    "forward_gradient": ("full", "block", "low_rank", "subspace", "sparse"),
    "zo_svrg": ("full",),
}
"""Estimator -> the structures of directions that it takes. What uses a snapshot's directions in later steps takes none
of block, low_rank and subspace, which reach something else in each step, nor sparse, which does at each point."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "block": {"order": "random_permutation"},
    "low_rank": {"rank": 2, "refresh_every": 50},
    "subspace": {"rank": 24, "refresh_every": 1000},
    "sparse": {"quantile": 0.25},
    "gradient_subspace": {"warmup_steps": 32},
}
"""Structure -> the keys that belong to it."""


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
        "and V), sparse (the smaller weights of each tensor), gradient_subspace (the leading directions of earlier "
        "gradients, in memory of 3 * probes + 1 float32 copies of the trained parameters)",
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

    warmup_steps: int | None = Field(
        None,
        ge=2,
        description="gradient_subspace: steps before the first snapshot, whose gradients the directions are read from "
        "(32); above probes",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_structure(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(structure := values.get("structure"), str):
            return values
        return {**_DEFAULTS.get(structure, {}), **{key: value for key, value in values.items() if value is not None}}

    @model_validator(mode="after")
    def _keys_belong_to_structure(self) -> "DirectionsConfig":
        for key in ("order", "rank", "refresh_every", "quantile", "warmup_steps"):
            owners = [structure for structure, defaults in _DEFAULTS.items() if key in defaults]
            if getattr(self, key) is not None and self.structure not in owners:
                raise ValueError(f"{key}: {self.structure} has no such setting ({' and '.join(owners)} only)")
        if self.structure == "gradient_subspace" and self.distribution != "rademacher":
            raise ValueError("distribution: gradient_subspace reads its directions from gradients; leave it out")
        if self.distribution == "sphere" and self.structure != "full":
            raise ValueError(
                f"distribution: sphere fixes the norm of the whole direction, and goes with structure: full; write "
                f"gaussian for {self.structure}"
            )
        return self


def check_structure(estimator: str, structure: Structure) -> None:
    """Refuses a structure that the estimator does not take."""
    allowed = STRUCTURES[estimator]
    if structure not in allowed:
        able = [name for name, structures in STRUCTURES.items() if structure in structures]
        raise ValueError(
            f"directions.structure: {estimator} takes {' or '.join(allowed)}, not {structure}; leave it "
            f"out, or write name: {' or '.join(able)}"
        )
