"""The `method` section: which estimator computes the step's direction, and how."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from vamo_ft.config.directions import DirectionsConfig, Structure, check_structure
from vamo_ft.config.section import Section
from vamo_ft.config.snapshot import RefreshedSnapshotConfig, SnapshotConfig

Difference = Literal["central", "forward"]

OPTIMIZERS: Mapping[str, str] = {
    "sgd": "sgd",
    "adamw": "adamw",
    "adagrad": "adagrad",
    "zo_adam": "adamw",
    "zo_sign": "sign_sgd",
    "zo_momentum": "sgd",
}
"""Method -> the optimizer that its name stands for; the other methods go with any."""

_STRUCTURE_OF: Mapping[str, Structure] = {
    "mezo_bcd": "block",
    "lozo": "low_rank",
    "subzero": "subspace",
    "sparse_mezo": "sparse",
}


_NAME = "the method; 'vamo-ft methods' lists them"


class MethodSection(Section):
    """What the rest of the program asks of any method.

    Attributes:
        projected: the estimate is a list of coefficients of directions, never a dense gradient.
        needs_gradient: the objective has to be differentiable.
    """

    projected: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True

    @property
    def structure(self) -> Structure | None:
        """Of its directions; None where they have no section, or there are none."""
        directions: DirectionsConfig | None = getattr(self, "directions", None)
        return None if directions is None else directions.structure

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """What `method.name` says for it, the estimator's own name first."""
        return get_args(cls.model_fields["name"].annotation)

    @model_validator(mode="after")
    def _structure_fits(self) -> "MethodSection":
        if self.structure is not None:
            check_structure(self.names()[0], self.structure)
        return self


class FirstOrderConfig(MethodSection):
    """Back-propagation. `sgd`, `adamw` and `adagrad` also choose the optimizer of that name."""

    name: Literal["first_order", "sgd", "adamw", "adagrad"] = Field(description=_NAME)


class SpsaConfig(MethodSection):
    """Zeroth-order estimate from loss differences (SPSA); other names also choose directions and optimizer."""

    projected: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False

    name: Literal["spsa", "mezo", "mezo_bcd", "lozo", "subzero", "sparse_mezo", "zo_adam", "zo_sign", "zo_momentum"] = (
        Field(description=_NAME)
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
    def _structure_is_that_of_the_name(self) -> "SpsaConfig":
        if self.directions.structure != _STRUCTURE_OF.get(self.name, self.directions.structure):
            raise ValueError(
                f"directions.structure: {self.directions.structure} contradicts name: {self.name}; leave it out, or "
                "write name: mezo"
            )
        return self


class VamoConfig(MethodSection):
    """VAMO: the mini-batch gradient, corrected by zeroth-order probes of a snapshot (arXiv 2505.13954)."""

    name: Literal["vamo"] = Field(description=_NAME)
    probes: int = Field(1, ge=1, description="q, directions per snapshot; 2q (central) or q+1 (forward) forward passes")
    eps: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="perturbation per coordinate (the distance moved is eps*sqrt(d)), or auto: of five values the one "
        "whose derivatives agree best with back-propagation on one micro-batch",
    )
    radius: Literal["auto"] | Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="gradient_subspace: distance moved along a direction, in place of eps; auto (its default) tries "
        "five values",
    )
    alpha: Literal["adaptive"] | Annotated[float, Field(ge=0)] = Field(
        "adaptive",
        description="coefficient of the projected correction; adaptive: the variance-optimal one, learnt from earlier "
        "steps. 1 is the theory's value, equals the paper's alpha q/d, and does harm where the snapshot is old",
    )
    difference: Difference = Field("central", description="central: error O(eps^2), 2q passes; forward: O(eps), q+1")
    directions: DirectionsConfig = DirectionsConfig()
    snapshot: RefreshedSnapshotConfig = RefreshedSnapshotConfig()
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
    def _directions_have_a_size(self) -> "VamoConfig":
        directions = self.directions
        if directions.structure != "gradient_subspace":
            if self.radius is not None:
                raise ValueError(
                    f"radius: directions.structure: {directions.structure} has no such setting; write eps, the "
                    "perturbation per coordinate"
                )
            return self
        if self.eps != "auto":
            raise ValueError("eps: gradient_subspace has directions of norm 1; write radius, the distance moved")
        assert directions.warmup_steps is not None
        if directions.warmup_steps <= self.probes:
            raise ValueError(
                f"directions.warmup_steps: {directions.warmup_steps} gradients do not give {self.probes} directions; "
                "it must be above probes"
            )
        return self

    @model_validator(mode="after")
    def _samples_are_in_the_table(self) -> "VamoConfig":
        snapshot = self.snapshot
        if snapshot.refresh == "adaptive" and snapshot.set != "all" and self.source == "table":
            raise ValueError(
                "snapshot.refresh: adaptive may keep a snapshot past the steps whose samples it scored; write "
                "snapshot.set: all, or source: recompute"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_offload(self) -> "VamoConfig":
        large = self.source == "recompute" or self.directions.structure == "gradient_subspace"
        if self.snapshot.offload and not large:
            raise ValueError(
                "snapshot.offload: a table of derivatives is small, and nothing of the parameters' size is kept; leave "
                "it out (it is for source: recompute and directions.structure: gradient_subspace)"
            )
        return self


class VamoLiteralConfig(MethodSection):
    """VAMO as published, for small models: directions of its own for every sample (arXiv 2505.13954)."""

    name: Literal["vamo_literal"] = Field(description=_NAME)
    probes: int = Field(1, ge=1, description="q, directions per sample and snapshot; q+1 forward passes")
    radius: float = Field(
        gt=0,
        description="the paper's mu, distance of a probe point along a unit vector; it is eps*sqrt(d) for a "
        "perturbation of eps per coordinate, so that it has to grow with the model",
    )
    alpha: Literal["theory"] | Annotated[float, Field(ge=0)] = Field(
        "theory", description="coefficient of the correction, or theory: q/d (1/d for q = 1)"
    )
    snapshot: SnapshotConfig = SnapshotConfig()

    @model_validator(mode="after")
    def _snapshot_is_of_all(self) -> "VamoLiteralConfig":
        if self.snapshot.set != "all":
            raise ValueError("snapshot.set: vamo_literal takes all samples; leave it out, or write name: vamo")
        return self


class AddaxConfig(MethodSection):
    """Long samples zeroth order, short ones by back-propagation (Addax, arXiv 2410.06441)."""

    name: Literal["addax"] = Field(description=_NAME)
    boundary: int = Field(
        gt=0, description="tokens of the longest sample that is back-propagated; longer ones are estimated from losses"
    )
    weight: float = Field(
        1e-3,
        gt=0,
        lt=1,
        description="the paper's alpha: weight of the long samples' estimate, against 1 - weight for the short ones' "
        "gradient. The estimate's norm is about sqrt(d) times the gradient's",
    )
    probes: int = Field(1, ge=1, description="q, directions per step; 2q (central) or q+1 (forward) forward passes")
    eps: float = Field(1e-3, gt=0, description="perturbation per coordinate; with an adapter preset 1e-2")
    difference: Difference = Field("central", description="central: error O(eps^2); forward: error O(eps), q+1 passes")
    directions: DirectionsConfig = DirectionsConfig()


class ForwardGradientConfig(MethodSection):
    """Exact directional derivatives by forward-mode differentiation, without a backward pass (arXiv 2202.08587)."""

    projected: ClassVar[bool] = True

    name: Literal["forward_gradient"] = Field(description=_NAME)
    probes: int = Field(
        1, ge=1, description="q, directions per step; a pass with derivatives each, which costs about two"
    )
    directions: DirectionsConfig = DirectionsConfig()


class SvrgConfig(MethodSection):
    """SVRG: the mini-batch gradient, corrected by back-propagation at a snapshot (arXiv 2311.05589)."""

    name: Literal["svrg"] = Field(description=_NAME)
    alpha: float = Field(1.0, ge=0, description="coefficient of the correction, at the start where it decays")
    alpha_decay: Literal["none", "linear"] = Field(
        "linear", description="alpha over the run: linear, down to 0 at its end (alpha-SVRG), or none (plain SVRG)"
    )
    snapshot: SnapshotConfig = SnapshotConfig()
    normaliser: Literal["data", "batch"] = Field(
        "data", description="divide the batch term by the data's mean token count (unbiased), or by the batch's own"
    )


class ZoSvrgConfig(MethodSection):
    """ZO-SVRG (arXiv 1805.10367): loss differences, corrected by those at a snapshot.

    `mezo_svrg` is a short period with a learning rate of its own for the full step (arXiv 2404.08080).
    """

    projected: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False

    name: Literal["zo_svrg", "mezo_svrg"] = Field(description=_NAME)
    probes: int = Field(1, ge=1, description="q, directions per step and per snapshot; 4q forward passes a step")
    eps: float = Field(
        1e-3,
        gt=0,
        description="perturbation per coordinate; the distance moved is eps*sqrt(d). With an adapter preset 1e-2",
    )
    difference: Difference = Field("central", description="central: error O(eps^2); forward: O(eps), 2q+2 passes")
    directions: DirectionsConfig = DirectionsConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    full_step_scale: float = Field(
        1.0,
        gt=0,
        description="learning rate of the snapshot's own step, a full zeroth-order step, in units of the learning rate "
        "(lr1 / lr2); mezo_svrg presets 10. Other values than 1 need plain sgd",
    )


MethodConfig = Annotated[
    FirstOrderConfig
    | SpsaConfig
    | VamoConfig
    | VamoLiteralConfig
    | SvrgConfig
    | ZoSvrgConfig
    | AddaxConfig
    | ForwardGradientConfig,
    Field(discriminator="name"),
]

METHOD_NAMES: tuple[str, ...] = tuple(
    name for section in get_args(get_args(MethodConfig)[0]) for name in section.names()
)
"""Every value that `method.name` takes."""
