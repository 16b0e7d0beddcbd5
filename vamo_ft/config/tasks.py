"""The tasks on which MeZO was measured, as formats of the data."""

from typing import Literal

from pydantic import Field

from vamo_ft.config.objective import FREE_TEXT_METRICS
from vamo_ft.config.section import Section

__all__ = ["TASK_CLASSES", "TaskFormat"]

TASK_CLASSES = {
    "sst2": ("negative", "positive"),
    "rte": ("entailment", "not_entailment"),
    "cb": ("entailment", "contradiction", "neutral"),
    "boolq": ("false", "true"),
    "wsc": ("false", "true"),
    "wic": ("false", "true"),
    "multirc": ("false", "true"),
}
"""Task -> its classes in the order of their numbers. Rows of every other task bring their own options or answers."""


class TaskFormat(Section):
    """A task with its prompt, verbalisers and columns (Malladi et al. 2023, arXiv 2305.17333, appendix E)."""

    type: Literal["task"] = Field(description="task: one of MeZO's, with prompt, label words and columns ready")
    name: Literal["sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop"] = Field(
        description="the task; rows have the columns of its Hub data set (GLUE, SuperGLUE, SQuAD, DROP)"
    )
    shots: int = Field(
        0,
        ge=0,
        description="solved examples in front of every prompt, the same for all, drawn from the first set of "
        "data.train that is of the task; a sample is "
        "never shown to itself",
    )
    shot_seed: int = Field(0, ge=0, lt=2**63, description="shots: which examples are drawn")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where every row has options or answers of its own."""
        return TASK_CLASSES.get(self.name, ())

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be measured beside the loss."""
        return FREE_TEXT_METRICS if self.name in ("squad", "drop") else ("accuracy",)
