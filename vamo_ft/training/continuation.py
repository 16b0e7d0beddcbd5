"""Whether a run may go on from a checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.training.checkpoint import Checkpoint

__all__ = ["check_base", "check_length", "check_samples", "check_settings", "tell_version"]

_log = logging.getLogger("vamo_ft")


def check_settings(checkpoint: Checkpoint, changes: Sequence[str], *, allow: bool) -> None:
    """Refuses a configuration that would make it another run, or logs the differences where they are allowed.

    Args:
        changes: settings that decide what a run computes and differ from the checkpoint's, as `key: old -> new`.

    Raises:
        UsageError: there are some, and they are not allowed.
    """
    if changes and not allow:
        raise UsageError(
            f"{checkpoint.path} belongs to a run with other settings ({'; '.join(changes)}); change them back, "
            f"start anew with --fresh, or continue all the same with {_option(checkpoint)}"
        )
    for change in changes:
        _log.warning("--allow-changes: %s", change)


def check_samples(checkpoint: Checkpoint, fingerprint: str, *, allow: bool) -> list[str]:
    """Refuses other training data, or logs it where it is allowed.

    Returns:
        The difference, in the form of changed settings; empty where there is none.

    Raises:
        DataError: the samples are not those of the checkpoint.
    """
    if checkpoint.facts["data"] == fingerprint:
        return []
    if not allow:
        raise DataError(
            f"data.train: the samples differ from those that {checkpoint.path} was trained on; restore the data, "
            f"start anew with --fresh, or continue all the same with {_option(checkpoint)}"
        )
    change = _difference("data.train samples", checkpoint.facts["data"], fingerprint)
    _log.warning("--allow-changes: %s", change)
    return [change]


def check_base(checkpoint: Checkpoint, found: Mapping[str, Any] | None, *, allow: bool) -> list[str]:
    """Refuses a base model or a tokenizer that are not those the run began with, or logs it where it is allowed.

    Args:
        found: what the model that `model.path` names has now, as in the checkpoint's fact `base`; None: it is not here,
            so that nothing can be compared.

    Returns:
        The differences, in the form of changed settings.

    Raises:
        DataError: there are some, and they are not allowed.
    """
    began = checkpoint.facts.get("base")
    if began is None or found is None:
        return []
    names = {"config": "configuration", "weights": "weights", "tokenizer": "tokenizer"}
    different = [key for key in names if began[key] != found[key]]
    if different and not allow:
        commits = "" if began["commit"] == found["commit"] else f" (commit {began['commit']}, now {found['commit']})"
        raise DataError(
            f"model.path: {found['path']}: the {' and the '.join(names[key] for key in different)} differ from what "
            f"{checkpoint.path} began with{commits}; restore the model, start anew with --fresh, or continue all the "
            f"same with {_option(checkpoint)}"
        )
    changes = [_difference(f"model.path {names[key]}", began[key], found[key]) for key in different]
    for change in changes:
        _log.warning("--allow-changes: %s", change)
    return changes


def _option(checkpoint: Checkpoint) -> str:
    return f"--resume {checkpoint.path} --allow-changes"


def _difference(name: str, old: str | None, new: str | None) -> str:
    """Of two hashes, shortened."""
    return f"{name}: {str(old)[:12]} -> {str(new)[:12]}"


def tell_version(checkpoint: Checkpoint, version: str) -> None:
    """Logs that the checkpoint was written by another version of this program than `version`."""
    if checkpoint.facts["version"] != version:
        _log.warning("%s was written by vamo-ft %s, this is %s", checkpoint.path, checkpoint.facts["version"], version)


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
