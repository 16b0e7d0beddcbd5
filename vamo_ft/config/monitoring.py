"""The sections of what accompanies training: `evaluation`, `checkpoint` and `logging`."""

from typing import Literal

from pydantic import Field, model_validator

from vamo_ft.config.objective import GENERATED_METRICS
from vamo_ft.config.period import Period
from vamo_ft.config.section import Section

LOWER_IS_BETTER = ("loss", "perplexity")
"""Metrics of which less is better; of every other more is."""


class EvaluationConfig(Section):
    """Evaluation on `data.evaluation`: before training, every period, and at the end."""

    every: Period | None = Field(None, description="period in steps or epochs; null: only before and after")
    metrics: list[Literal["loss", "perplexity", "accuracy", "exact_match", "f1", "rouge_l"]] = Field(
        ["loss"],
        min_length=1,
        description="loss (mean per supervised token) and, of free text, perplexity (its exponential); accuracy of "
        "the option that scores highest (classification); exact_match, f1 and rouge_l of generated answers "
        "(prompt_completion, and the last turn of a chat)",
    )
    max_new_tokens: int = Field(
        32, gt=0, description="exact_match, f1, rouge_l: longest answer that is generated, in tokens"
    )

    @property
    def answer_tokens(self) -> int | None:
        """Longest answer in tokens; None where nothing is generated."""
        return self.max_new_tokens if any(name in GENERATED_METRICS for name in self.metrics) else None

    @model_validator(mode="after")
    def _only_answers_have_a_length(self) -> "EvaluationConfig":
        if self.answer_tokens is None and self.max_new_tokens != type(self).model_fields["max_new_tokens"].default:
            raise ValueError(
                "max_new_tokens: nothing is generated; add exact_match, f1 or rouge_l to metrics, or leave it out"
            )
        return self


class CheckpointConfig(Section):
    """Checkpoints, from which a run continues."""

    every: Period | None = Field(None, description="period in steps or epochs; null: only at the end or on a signal")
    keep: int = Field(2, gt=0, description="newest checkpoints kept")
    on_error: Literal["stop", "continue"] = Field(
        "stop",
        description="when a periodic checkpoint cannot be written: stop with exit code 2, or warn and continue to the "
        "next one. The last good checkpoint stays either way",
    )


class LoggingConfig(Section):
    """What is written while training."""

    every: Period = Field(Period(10, "step"), description="period of training lines in metrics.jsonl and the log")
