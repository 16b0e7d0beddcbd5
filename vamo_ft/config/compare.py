"""Which keys of a configuration may change when a run is continued."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vamo_ft.config.yaml_text import KeyPath, dotted

__all__ = ["leaves", "meaning_changes"]

_FREE = (
    "run.name",
    "run.output_dir",
    "run.offline",
    "training.steps",
    "training.epochs",
    "training.max_seconds",
    "training.check_processes_every",
    "training.micro_batch_size",
    "training.forward_batch_tokens",
    "training.activation_checkpointing",
    "training.stream_layers",
    "training.fsdp",
    "training.on_divergence",
    "training.rollbacks",
    "method.snapshot.offload",
    "data.evaluation",
    "evaluation",
    "checkpoint",
    "logging",
    "compare",
)
"""Length, time, memory, evaluation, record keeping and comparisons. Another length moves a linear or cosine schedule,
and another cut into micro-batches changes rounding and dropout masks; everything else would make it another run."""


def meaning_changes(old: Mapping[str, Any], new: Mapping[str, Any], *, free: Sequence[str] = _FREE) -> list[str]:
    """The keys in which two resolved configurations differ, as `key: old -> new`.

    Args:
        free: keys and sections that may differ.
    """
    before, after = ({dotted(path): value for path, value in leaves(tree)} for tree in (old, new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(f"{key}.".startswith(f"{section}.") for section in free)
    ]


def leaves(tree: Mapping[Any, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Path and value of everything in a resolved configuration; a list of anything but sections is one value."""
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            yield from leaves(value, here)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield from leaves(dict(enumerate(value)), here)
        else:
            yield here, value
