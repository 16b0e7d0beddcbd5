"""State trees as files: standard JSON, and the tensors beside it.

<owner>.json                the tree; a dict with a key `$...` stands for another value
<owner>.safetensors         its tensors, named by their path in the tree
<owner>.part-0.safetensors  of the tensors that processes share out, the rows of process 0, and so on
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vamo_ft.core.protocols import StateDict
from vamo_ft.core.sharding import Part, rows_of
from vamo_ft.training.rundir import write_json

__all__ = ["SplitState", "as_json", "from_json", "read_state", "split_state", "write_parts", "write_state"]


@dataclass(frozen=True, slots=True)
class SplitState:
    """A state tree without its tensors, and these by their path.

    Attributes:
        tree: JSON.
        tensors: that one process saves.
        parts: this process's rows of those that all save together.
    """

    tree: Any
    tensors: dict[str, Tensor]
    parts: dict[str, Tensor]


def split_state(owner: str, state: StateDict) -> SplitState:
    """What is written of the state of `owner`.

    Raises:
        TypeError: it holds something else than a state tree may.
    """
    assert re.fullmatch(r"\w+", owner), owner
    split = SplitState(None, {}, {})
    tree = _split(state, path="", into=split)
    storages: set[int] = set()
    for tensors in (split.tensors, split.parts):
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
            storages.add(storage)
    return SplitState(tree, split.tensors, split.parts)


def write_state(folder: Path, owner: str, split: SplitState) -> None:
    """Writes tree and tensors, and the parts of process 0."""
    save_file(split.tensors, folder / f"{owner}.safetensors")
    write_parts(folder, owner, split, rank=0)
    write_json(folder / f"{owner}.json", split.tree)


def write_parts(folder: Path, owner: str, split: SplitState, *, rank: int) -> None:
    """Writes what process `rank` holds of the tensors that all save together, where there are any."""
    if split.parts:
        save_file(split.parts, folder / f"{owner}.part-{rank}.safetensors")


def read_state(folder: Path, owner: str, *, share: tuple[int, int]) -> StateDict:
    """The state of `owner`, its tensors on the CPU.

    Args:
        share: (number, of how many), the part to take of tensors that processes shared out, however many these were.
    """
    tree = json.loads((folder / f"{owner}.json").read_text(encoding="utf-8"))
    count = len(list(folder.glob(f"{owner}.part-*.safetensors")))
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(folder / f"{owner}.part-{number}.safetensors", framework="pt"))
            for number in range(count)
        ]
        state: StateDict = _joined(tree, load_file(folder / f"{owner}.safetensors"), files=files, share=share)
    return state


def as_json(value: Any) -> Any:
    """A tree without tensors as standard JSON."""
    return _split(value, path="/facts", into=None)


def from_json(value: Any) -> Any:
    """Undoes `as_json`."""
    return _joined(value, {})


def _split(value: Any, *, path: str, into: SplitState | None) -> Any:
    """`value` as standard JSON, its tensors put into `into`; a dict with a key `$...` stands for another value."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Tensor) and into is not None:
        into.tensors[path] = value.detach().cpu().contiguous()
        return {"$tensor": path}
    if isinstance(value, Part) and into is not None:
        into.parts[path] = value.tensor.detach().cpu().contiguous()
        return {"$part": path, "dim": value.dim, "size": value.size}
    if type(value) is list:
        return [_split(item, path=f"{path}/{index}", into=into) for index, item in enumerate(value)]
    if type(value) is dict and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {
            key: _split(item, path=f"{path}/{key.replace('~', '~0').replace('/', '~1')}", into=into)
            for key, item in value.items()
        }
    raise TypeError(f"state{path}: {type(value).__name__} cannot be saved")


def _joined(
    value: Any, tensors: Mapping[str, Tensor], *, files: Sequence[Any] = (), share: tuple[int, int] = (0, 1)
) -> Any:
    if isinstance(value, list):
        return [_joined(item, tensors, files=files, share=share) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$part" in value:
        return _rows(files, value["$part"], dim=value["dim"], size=value["size"], share=share)
    if "$float" in value:
        return float(value["$float"])
    return {key: _joined(item, tensors, files=files, share=share) for key, item in value.items()}


def _rows(files: Sequence[Any], name: str, *, dim: int, size: int, share: tuple[int, int]) -> Tensor:
    """The rows of one share, from the files that hold some of them."""
    wanted = rows_of(size, rank=share[0], processes=share[1])
    pieces = []
    for number, file in enumerate(files):
        held = rows_of(size, rank=number, processes=len(files))
        start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
        if start < stop:
            place = (*[slice(None)] * dim, slice(start - held.start, stop - held.start))
            pieces.append(file.get_slice(name)[place])
    return torch.cat(pieces, dim) if pieces else files[0].get_tensor(name).narrow(dim, 0, 0).clone()
