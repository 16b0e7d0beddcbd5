"""The tasks on which MeZO was measured: from rows to prompts, options and answers, as pure functions."""

from collections.abc import Mapping

from vamo_ft.data.tasks.answering import ANSWERING_TASKS
from vamo_ft.data.tasks.classification import CLASSIFICATION_TASKS
from vamo_ft.data.tasks.multiple_choice import MULTIPLE_CHOICE_TASKS
from vamo_ft.data.tasks.sample import Task, TaskSample

__all__ = ["TASKS", "Task", "TaskSample"]

TASKS: Mapping[str, Task] = {**CLASSIFICATION_TASKS, **MULTIPLE_CHOICE_TASKS, **ANSWERING_TASKS}
"""Every task by `data.format.name`."""
