"""The `objective` section: what a step minimises."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vamo_ft.config.section import Section

GENERATED_METRICS = ("exact_match", "f1")
"""Metrics of generated answers, as `objective.name` and in `evaluation.metrics`."""

ANSWERED_FORMATS = ("prompt_completion", "chat")
"""Values of `data.format.type` with a prompt and a right answer."""


class LossObjectiveConfig(Section):
    """The cross-entropy of the supervised text, or of the right class."""

    type: Literal["loss"] = Field(description="loss (cross-entropy), or metric")

    @property
    def answer_tokens(self) -> None:
        """Nothing is generated."""


class MetricObjectiveConfig(Section):
    """One minus a metric that has no gradient (Malladi et al. 2023, arXiv 2305.17333, section 3.3)."""

    type: Literal["metric"] = Field(description="metric (one minus it, averaged over samples), or loss")
    name: Literal["accuracy", "exact_match", "f1"] = Field(
        description="accuracy (classification), or exact_match or f1 of a generated answer (prompt_completion, "
        "chat). A metric moves in jumps: it needs a larger method.eps and larger batches than a loss, so that some "
        "answers change"
    )
    max_new_tokens: int = Field(32, gt=0, description="exact_match, f1: longest answer that is generated, in tokens")

    @property
    def answer_tokens(self) -> int | None:
        """Longest answer in tokens; None where nothing is generated."""
        return self.max_new_tokens if self.name in GENERATED_METRICS else None

    @model_validator(mode="after")
    def _accuracy_generates_nothing(self) -> "MetricObjectiveConfig":
        if self.answer_tokens is None and self.max_new_tokens != type(self).model_fields["max_new_tokens"].default:
            raise ValueError("max_new_tokens: accuracy generates nothing (exact_match and f1 only); leave it out")
        return self


ObjectiveConfig = Annotated[LossObjectiveConfig | MetricObjectiveConfig, Field(discriminator="type")]
