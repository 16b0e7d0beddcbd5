"""Whether a run may go on from a checkpoint."""

import logging
from collections.abc import Sequence

from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.training.checkpoint import Checkpoint

__all__ = ["check_length", "check_samples", "check_settings"]

_log = logging.getLogger("vamo_ft")


def check_settings(checkpoint: Checkpoint, changes: Sequence[str]) -> None:
    """Refuses a configuration that would make it another run.

    Args:
        changes: settings that decide what a run computes and differ from the checkpoint's, as `key: old -> new`.

    Raises:
        UsageError: there are some.
    """
    if changes:
        raise UsageError(
            f"{checkpoint.path} belongs to a run with other settings ({'; '.join(changes)}); change them back, or "
            "start anew with --fresh"
        )


def check_samples(checkpoint: Checkpoint, fingerprint: str) -> None:
    """Refuses other training data.

    Raises:
        DataError: the samples are not those of the checkpoint.
    """
    if checkpoint.facts["data"] != fingerprint:
        raise DataError(
            f"data.train: the samples differ from those that {checkpoint.path} was trained on; restore the data, or "
            "start anew with --fresh"
        )


def check_length(checkpoint: Checkpoint, num_steps: int, *, courses: Sequence[str]) -> None:
    """Refuses a length that lies behind the checkpoint, and warns of what jumps with another length.

    Args:
        courses: what runs along the whole length, such as the schedule of the learning rate.

    Raises:
        UsageError: the checkpoint is past `num_steps`.
    """
    if checkpoint.step > num_steps:
        raise UsageError(
            f"{checkpoint.path} is at step {checkpoint.step}, past the {num_steps} steps of this configuration; raise "
            "training.steps, go on from an earlier one with --resume PATH, or start anew with --fresh"
        )
    planned = checkpoint.facts["num_steps"]
    if planned != num_steps and courses:
        _log.warning(
            "the run was planned for %d steps and is now for %d: the %s goes on as if it had been so from the "
            "start, at another value than before",
            planned,
            num_steps,
            " and the ".join(courses),
        )
