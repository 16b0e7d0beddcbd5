"""Checkpoints that are complete or invisible, and hold nothing that runs code when it is opened.

    step-00000200/
      model/                     what the model saver wrote; safetensors
      state/                     the owners' state trees, see `training.state_files`
      MANIFEST.json              step, facts, and size and SHA-256 of every other file

A checkpoint is written under a hidden name beside its place, synced file by file, and renamed. One of the same step
that stands there already is first renamed to `.replaced-step-00000200`, which counts until the new one is in place.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.core.protocols import StateDict
from vamo_ft.training.disk import disk_error, folder_bytes, free_bytes, gigabytes, is_full
from vamo_ft.training.rundir import sync, write_json
from vamo_ft.training.state_files import as_json, from_json, read_state, split_state, write_state

__all__ = [
    "Checkpoint",
    "checkpoint_folders",
    "checkpoint_path",
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
        share: what `load` takes of tensors that processes share out: (number of the part, of how many).
    """

    path: Path
    step: int
    facts: Mapping[str, Any]
    share: tuple[int, int] = (0, 1)

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
        if not self.holds(owner):
            raise DataError(f"{self.path}: has no state of {owner}; it belongs to a run with another configuration")
        return read_state(self.path / "state", owner, share=self.share)


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands, or would."""
    return root / f"step-{step:08d}"


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
    write_others: Callable[[Path], None] = lambda folder: None,
    processes: int = 1,
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
        write_others: has other processes write their parts of the state into the folder that it is given.
        processes: that hold parts, this one included.

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
    split = {owner: split_state(owner, state) for owner, state in owners.items()}
    needed = sum(tensor.nbytes for each in split.values() for tensor in each.tensors.values())
    needed += processes * sum(tensor.nbytes for each in split.values() for tensor in each.parts.values())
    needed += max(model_bytes, _newest_bytes(root, "model"))
    if (missing := needed - free_bytes(root)) > 0:
        raise SaveError(
            f"{root}: a checkpoint needs {gigabytes(needed)} and {gigabytes(needed - missing)} are free, "
            f"{gigabytes(missing)} are missing{_last_good(root)}"
        )
    final = checkpoint_path(root, step)
    temporary = root / f".tmp-{final.name}.{os.getpid()}"  # never that of a process which took the run over
    try:
        (temporary / "state").mkdir(parents=True)
        (temporary / "model").mkdir()
        save_model(temporary / "model")
        for owner, each in split.items():
            write_state(temporary / "state", owner, each)
        write_others(temporary / "state")
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
    return Checkpoint(path=path, step=manifest["step"], facts=from_json(manifest["facts"]))


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


def _write_manifest(directory: Path, *, step: int, facts: Mapping[str, Any]) -> None:
    """Syncs every file, then writes the manifest, which carries a hash of itself."""
    files = {}
    for folder, _, names in os.walk(directory):
        for path in (Path(folder) / name for name in names):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
        sync(Path(folder))
    content = {"format": _FORMAT, "step": step, "facts": as_json(dict(facts)), "files": files}
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
        if path.name.removeprefix(_REPLACED) != checkpoint_path(path.parent, manifest["step"]).name:
            raise DataError(f"{path}: {_MANIFEST} belongs to step {manifest['step']}")
        _check_shape(manifest)
        return manifest
    except FileNotFoundError:
        if not path.exists():
            raise DataError(f"{path}: there is no such checkpoint") from None
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
    sync(final.parent)


def _remove_obsolete(root: Path, *, step: int, keep: int, best_step: int | None) -> None:
    _remove_later(root, step=step)
    paths = checkpoint_folders(root)
    kept = set([path for path in paths if path.name.startswith("step-")][:keep])
    if best_step is not None:
        kept.add(checkpoint_path(root, best_step))
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
