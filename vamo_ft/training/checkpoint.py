"""Checkpoints that are complete or invisible, and hold nothing that runs code when it is opened.

    step-00000200/
      model/                     what the model saver wrote; safetensors
      state/<owner>.json         the owner's state tree, with a placeholder for each tensor
      state/<owner>.safetensors  those tensors, named by their path in the tree
      MANIFEST.json              step, facts, and size and SHA-256 of every other file

A checkpoint is written under a hidden name beside its place, synced file by file, and renamed. One of the same step
that stands there already is first renamed to `.replaced-step-00000200`, which counts until the new one is in place.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.core.protocols import StateDict
from vamo_ft.training.disk import disk_error, folder_bytes, free_bytes, gigabytes, is_full
from vamo_ft.training.rundir import sync_directory, write_json

__all__ = [
    "Checkpoint",
    "checkpoint_folders",
    "discard_later",
    "newest_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]

_log = logging.getLogger("vamo_ft")
_FORMAT = 1
_MANIFEST = "MANIFEST.json"
_REPLACED = ".replaced-"
_NAME = re.compile(rf"({re.escape(_REPLACED)})?step-(\d{{8,}})")


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint.

    Attributes:
        step: steps done.
        facts: the JSON values it was saved with.
    """

    path: Path
    step: int
    facts: Mapping[str, Any]

    @property
    def model_dir(self) -> Path:
        """The folder that the model saver wrote."""
        return self.path / "model"

    def holds(self, owner: str) -> bool:
        """Whether it has a state of `owner`."""
        return (self.path / "state" / f"{owner}.json").is_file()

    def load(self, owner: str) -> StateDict:
        """The state of `owner`, its tensors on the CPU.

        Raises:
            DataError: the checkpoint has no such owner.
        """
        place = self.path / "state" / owner
        if not self.holds(owner):
            raise DataError(f"{self.path}: has no state of {owner}; it belongs to a run with another configuration")
        tree = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        state: StateDict = _joined(tree, load_file(place.with_suffix(".safetensors")))
        return state


def save_checkpoint(
    root: Path,
    *,
    step: int,
    owners: Mapping[str, StateDict],
    save_model: Callable[[Path], None],
    facts: Mapping[str, Any],
    keep: int,
    model_bytes: int = 0,
    check_held: Callable[[], None] = lambda: None,
    best_step: int | None = None,
) -> Path:
    """Writes `root/step-<step>`, then removes what it makes obsolete.

    Obsolete are all but the `keep` newest and that of `best_step`, and those of later steps: they belong to a
    continuation that was given up.

    Args:
        owners: name -> state tree. Numbers survive exactly, NaN and infinities included; dtypes too.
        save_model: writes the model into the folder it is given.
        facts: JSON values that identify the run, readable without loading an owner.
        keep: at least 1.
        model_bytes: what `save_model` writes at least, where no earlier checkpoint tells.
        check_held: asked before anything of `root` is changed, at first and when all is written; raises where it is
            another process's by now.
        best_step: of the checkpoint that stays however old it is; None: there is none.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: it could not be written, for want of space or another reason; earlier ones are untouched.
        TypeError: a state tree or `facts` holds something else than their types allow.
    """
    assert keep >= 1
    check_held()
    root.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(root)
    split = {owner: _split_state(owner, state) for owner, state in owners.items()}
    needed = sum(tensor.nbytes for _, tensors in split.values() for tensor in tensors.values())
    needed += max(model_bytes, _newest_bytes(root, "model"))
    if (missing := needed - free_bytes(root)) > 0:
        raise SaveError(
            f"{root}: a checkpoint needs {gigabytes(needed)} and {gigabytes(needed - missing)} are free, "
            f"{gigabytes(missing)} are missing{_last_good(root)}"
        )
    final = root / f"step-{step:08d}"
    temporary = root / f".tmp-{final.name}.{os.getpid()}"  # never that of a process which took the run over
    try:
        (temporary / "state").mkdir(parents=True)
        (temporary / "model").mkdir()
        save_model(temporary / "model")
        for owner, (tree, tensors) in split.items():
            save_file(tensors, temporary / "state" / f"{owner}.safetensors")
            write_json(temporary / "state" / f"{owner}.json", tree)
        _write_manifest(temporary, step=step, facts=facts)
        check_held()
        _put_in_place(temporary, final)
    except Exception as error:
        if (cause := disk_error(error)) is None:
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(
            f"{final}: could not be saved: {_shortage(root, needed, cause)}{cause}{_last_good(root)}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_obsolete(root, step=step, keep=keep, best_step=best_step)
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file of it verified.

    Raises:
        DataError: it is damaged; names the file and what is wrong with it.
    """
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        _verify_file(path, name, size=entry["size"], sha256=entry["sha256"])
    return Checkpoint(path=path, step=manifest["step"], facts=_joined(manifest["facts"], {}))


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest intact checkpoint in `root`; damaged ones are logged and skipped."""
    for path in checkpoint_folders(root):
        try:
            return open_checkpoint(path)
        except DataError as error:
            _log.warning("checkpoint skipped: %s", error)
    return None


def discard_later(checkpoint: Checkpoint) -> None:
    """Removes the checkpoints of later steps: a run that goes on from an earlier one gives their continuation up.

    So does what a killed process left half written or half removed: a run at its end may have nothing more to save.
    """
    _remove_later(checkpoint.path.parent, step=checkpoint.step)
    _remove_unfinished(checkpoint.path.parent)


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoints in `root`, intact or not, newest first; a replaced one follows its replacement."""
    found = [(match, path) for path in root.glob("*step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: (-int(pair[0][2]), pair[0][1] is not None))]


def _split_state(owner: str, state: StateDict) -> tuple[Any, dict[str, Tensor]]:
    assert re.fullmatch(r"\w+", owner), owner
    tensors: dict[str, Tensor] = {}
    tree = _split(state, path="", tensors=tensors)
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
        storages.add(storage)
    return tree, tensors


def _split(value: Any, *, path: str, tensors: dict[str, Tensor] | None) -> Any:
    """`value` as standard JSON, its tensors put into `tensors`; a dict with a key `$...` stands for another value."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Tensor) and tensors is not None:
        tensors[path] = value.detach().cpu().contiguous()
        return {"$tensor": path}
    if type(value) is list:
        return [_split(item, path=f"{path}/{index}", tensors=tensors) for index, item in enumerate(value)]
    if type(value) is dict and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {
            key: _split(item, path=f"{path}/{key.replace('~', '~0').replace('/', '~1')}", tensors=tensors)
            for key, item in value.items()
        }
    raise TypeError(f"state{path}: {type(value).__name__} cannot be saved")


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_joined(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    return {key: _joined(item, tensors) for key, item in value.items()}


def _write_manifest(directory: Path, *, step: int, facts: Mapping[str, Any]) -> None:
    """Syncs every file, then writes the manifest, which carries a hash of itself."""
    files = {}
    for folder, _, names in os.walk(directory):
        for path in (Path(folder) / name for name in names):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
        sync_directory(Path(folder))
    tree = _split(dict(facts), path="/facts", tensors=None)
    content = {"format": _FORMAT, "step": step, "facts": tree, "files": files}
    write_json(directory / _MANIFEST, {**content, "sha256": _digest(content)})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    place = path / _MANIFEST
    try:
        if path.is_symlink() or place.is_symlink():
            raise ValueError("is a symbolic link")
        manifest: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError("its SHA-256 differs")
        if manifest["format"] != _FORMAT:
            raise DataError(f"{path}: {_MANIFEST} has format {manifest['format']}, this version reads {_FORMAT}")
        if type(manifest["step"]) is not int:
            raise ValueError("step is not a whole number")
        if path.name.removeprefix(_REPLACED) != f"step-{manifest['step']:08d}":
            raise DataError(f"{path}: {_MANIFEST} belongs to step {manifest['step']}")
        _check_shape(manifest)
        return manifest
    except FileNotFoundError:
        raise DataError(f"{path}: {_MANIFEST} is missing; this is not a complete checkpoint") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: {_MANIFEST} is damaged: {error}") from None


def _check_shape(manifest: Mapping[str, Any]) -> None:
    """A manifest from elsewhere may have the right hash and still not be one."""
    if not isinstance(manifest["facts"], dict):
        raise ValueError("facts is not an object")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(map(_is_entry, files, files.values())):
        raise ValueError("an entry of files is not a name with its size and SHA-256")


def _is_entry(name: str, entry: Any) -> bool:
    match entry:
        case {"size": int(), "sha256": str()}:
            return name.isprintable()
    return False


def _verify_file(root: Path, name: str, *, size: int, sha256: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise DataError(f"{root}: {name} points outside of the checkpoint")
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise DataError(f"{root}: {path.relative_to(root)} is a symbolic link")
    if not path.is_file():
        raise DataError(f"{root}: {name} is missing")
    if path.stat().st_size != size:
        raise DataError(f"{root}: {name} has {path.stat().st_size} bytes instead of {size}")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{root}: {name} cannot be read: {error}") from error
    if digest != sha256:
        raise DataError(f"{root}: {name} is damaged: its SHA-256 differs")


def _newest_bytes(root: Path, part: str = "") -> int:
    """Size of the newest checkpoint, or of a folder in it; 0 where there is none."""
    return sum(folder_bytes(newest / part) for newest in checkpoint_folders(root)[:1])


def _shortage(root: Path, needed: int, error: OSError) -> str:
    """How much is missing, after what was written of a checkpoint is removed again."""
    if not is_full(error):
        return ""
    free = free_bytes(root)
    if free < needed:
        return f"it needs {gigabytes(needed)}, {gigabytes(free)} are free and {gigabytes(needed - free)} missing: "
    return (
        f"it needs {gigabytes(needed)}, and {gigabytes(free)} are free, so that other writers, a quota or a limit on "
        "the size of files leave too little: "
    )


def _last_good(root: Path) -> str:
    return "".join(f"; the last checkpoint stays: {path}" for path in checkpoint_folders(root)[:1])


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():
        replaced = final.with_name(_REPLACED + final.name)
        _remove([replaced])
        final.rename(replaced)
    temporary.rename(final)
    sync_directory(final.parent)


def _remove_obsolete(root: Path, *, step: int, keep: int, best_step: int | None) -> None:
    _remove_later(root, step=step)
    paths = checkpoint_folders(root)
    kept = set([path for path in paths if path.name.startswith("step-")][:keep])
    if best_step is not None:
        kept.add(root / f"step-{best_step:08d}")
    _remove(path for path in paths if path not in kept)


def _remove_unfinished(root: Path) -> None:
    _remove(path for path in root.iterdir() if path.name.startswith(".tmp-"))


def _remove_later(root: Path, *, step: int) -> None:
    _remove(path for path in checkpoint_folders(root) if int(path.name.removeprefix(_REPLACED)[5:]) > step)


def _remove(paths: Iterable[Path]) -> None:
    """Hides each folder before it is emptied, so that a kill half way leaves no damaged checkpoint to be found."""
    for path in list(paths):
        try:
            hidden = path if path.name.startswith(".tmp-") else path.rename(path.with_name(f".tmp-{path.name}"))
            shutil.rmtree(hidden)
        except FileNotFoundError:
            continue
        except OSError as error:
            _log.warning("%s: could not be removed: %s", path, error)
