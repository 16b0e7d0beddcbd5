"""Whether what a run writes fits on its disk, asked before it starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vamo_ft.core.errors import SaveError
from vamo_ft.core.sharding import Part
from vamo_ft.training.checkpoint import checkpoint_folders
from vamo_ft.training.disk import folder_bytes, free_bytes, gigabytes

__all__ = ["SMALL_FILES", "check_run_space", "tensor_bytes"]

SMALL_FILES = 16 * 2**20
"""Bytes of room for what is not a tensor of the model or the state: tokenizer, configuration, metrics, log."""


def check_run_space(root: Path, *, state_bytes: int, model_bytes: int, num_saves: int, keep: int) -> None:
    """Whether the checkpoints of a run and its final model fit on the disk beside those that are there.

    Old checkpoints go only after a new one is in place, so that one more than `keep` are there at a time.

    Args:
        root: folder of the checkpoints.
        state_bytes: of the state's tensors in one checkpoint.
        model_bytes: of the model in it.
        num_saves: checkpoints that are still to come.
        keep: newest ones that stay.

    Raises:
        SaveError: they do not fit; says how much is missing.
    """
    present = checkpoint_folders(root)
    one = max([state_bytes + model_bytes, *map(folder_bytes, present[:1])])
    new = min(max(1, keep + 1 - len(present)), num_saves)
    needed = new * one + model_bytes
    if (missing := needed - free_bytes(root)) > 0:
        raise SaveError(
            f"{root}: {new} checkpoint{'' if new == 1 else 's'} of {gigabytes(one)} and the final model need "
            f"{gigabytes(needed)}, {gigabytes(needed - missing)} are free and {gigabytes(missing)} missing; make room, "
            "lower checkpoint.keep, or choose another run.output_dir"
        )


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in a state tree."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Part):
        return tree.whole_bytes
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    return sum(tensor_bytes(value) for value in values)
