"""Solved examples in front of a prompt, for learning in context."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from vamo_ft.config.tasks import TaskFormat
from vamo_ft.core.errors import DataError
from vamo_ft.core.hashing import Domain, HashKey, permutation
from vamo_ft.data.rows import Rows
from vamo_ft.data.tasks import TASKS, TaskSample
from vamo_ft.data.values import check_columns

__all__ = ["Demonstrations", "draw_demonstrations"]

_BETWEEN = "\n\n"


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """The same solved examples for every sample, as in the in-context evaluations of arXiv 2305.17333.

    Attributes:
        samples: one more than is shown, which takes the place of an example that is the sample itself.
    """

    samples: Sequence[TaskSample]

    def before(self, sample: TaskSample) -> str:
        """The prompt of `sample` behind the examples, from which a blank line separates it."""
        others = (each for each in self.samples if each != sample)
        shots = islice(others, len(self.samples) - 1)
        return "".join(f"{shot.prompt}{shot.completion}{_BETWEEN}" for shot in shots) + sample.prompt


def draw_demonstrations(rows: Rows, config: TaskFormat, *, key: str = "data.format") -> Demonstrations:
    """`config.shots` examples out of the training rows, and one to spare, by `config.shot_seed`; none is there twice.

    Args:
        key: of `config` in the configuration, for messages.

    Raises:
        DataError: a row is not what the task needs, or there are too few different ones.
    """
    task = TASKS[config.name]
    check_columns(rows, task.columns, key=f"{key}.name: {config.name}")
    found: dict[TaskSample, None] = {}
    for row in permutation(len(rows), HashKey(config.shot_seed, Domain.SHOTS, 0, 0)).tolist():
        found[task.build(rows.rows[row], rows.place_of(row))] = None
        if len(found) > config.shots:
            return Demonstrations(tuple(found))
    raise DataError(
        f"{rows.place}: {key}.shots: {config.shots} examples and one to spare, for the samples that are among "
        f"them, are more than its {len(found)} different rows"
    )
