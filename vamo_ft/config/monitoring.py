"""The sections of what accompanies training: `evaluation`, `checkpoint` and `logging`."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

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
    part: Literal["tune", "test"] | None = Field(
        None,
        description="one half of data.evaluation, drawn without regard to the seed: tune, to choose settings by, or "
        "test, to report; null: all of it",
    )
    metric_for_best_model: str | None = Field(
        None,
        description="one of metrics: the checkpoint of the best evaluation is written and kept beside the newest ones. "
        "Of a loss the lowest is the best, of others the highest; null: loss, where one of the next keys needs it",
    )
    load_best_model_at_end: bool = Field(
        False, description="make the model of the best evaluation the final one, in place of the last step's"
    )
    early_stopping_patience: int | None = Field(
        None, gt=0, description="end the run after so many evaluations in a row without an improvement; null: never"
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="what an improvement has to exceed to count, in the metric's unit"
    )

    @property
    def ranked_by(self) -> str | None:
        """The metric that tells the best evaluation; None where nobody asks for it."""
        if self.load_best_model_at_end or self.early_stopping_patience is not None:
            return self.metric_for_best_model or "loss"
        return self.metric_for_best_model

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

    @model_validator(mode="after")
    def _the_best_is_measured(self) -> "EvaluationConfig":
        if self.early_stopping_patience is None and self.early_stopping_threshold != 0:
            raise ValueError("early_stopping_threshold: needs early_stopping_patience; add it, or leave this out")
        if self.ranked_by is None:
            return self
        if self.ranked_by not in self.metrics:
            raise ValueError(
                f"metric_for_best_model: {self.ranked_by} is not measured; add it to metrics, or write "
                f"{' or '.join(self.metrics)}"
            )
        if self.every is None:
            raise ValueError("every: null evaluates the last step alone, and there is no best one; write a period")
        return self


class CheckpointConfig(Section):
    """Checkpoints, from which a run continues."""

    every: Period | None = Field(None, description="period in steps or epochs; null: only at the end or on a signal")
    keep: int = Field(2, gt=0, description="newest checkpoints kept; that of the best evaluation stays besides")
    on_error: Literal["stop", "continue"] = Field(
        "stop",
        description="when a periodic checkpoint cannot be written: stop with exit code 2, or warn and continue to the "
        "next one. The last good checkpoint stays either way",
    )


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class LoggingConfig(Section):
    """What is written while training."""

    every: Period = Field(Period(10, "step"), description="period of training lines in metrics.jsonl and the log")
    trackers: list[TrackerName] = Field(
        [], description="what else gets the lines of metrics.jsonl; a tracker that fails never ends the run"
    )
    project: str | None = Field(
        None,
        min_length=1,
        description="project (wandb, trackio) or experiment (mlflow); null: WANDB_PROJECT, TRACKIO_PROJECT or "
        "MLFLOW_EXPERIMENT_NAME, else vamo-ft",
    )
    report: bool = Field(True, description="write report.html, a page with pictures, when the run is finished")

    @field_validator("trackers")
    @classmethod
    def _each_tracker_once(cls, value: list[TrackerName]) -> list[TrackerName]:
        if len(set(value)) < len(value):
            raise ValueError("names a tracker twice")
        return value

    @model_validator(mode="after")
    def _some_tracker_has_projects(self) -> "LoggingConfig":
        if self.project is not None and not set(self.trackers) - {"tensorboard"}:
            raise ValueError("project: only wandb, mlflow and trackio have one; add one to trackers, or leave it out")
        return self
