"""The folder of one run: where each file is, durable writes, and the lock that keeps a second process out."""

import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from os.path import exists
from pathlib import Path
from typing import Any

from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.training.disk import is_full
from vamo_ft.training.lease import Holder, Lease, living_holder

__all__ = [
    "RunDirectory",
    "environment",
    "read_json",
    "sync",
    "sync_folder",
    "unused",
    "write_json",
    "write_text",
]

_log = logging.getLogger("vamo_ft")
_PACKAGES = ("vamo-ft", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors")


class RunDirectory:
    """`<output_dir>/<name>/`, made when it is first locked or written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.environment = root / "environment.json"
        self.metrics = root / "metrics.jsonl"
        self.seed_log = root / "seedlog.bin"
        self.log = root / "log.txt"
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.status = root / "status.json"
        self.report = root / "report.html"
        self._lease_file = root / ".lease.json"
        self._lock: int | None = None
        self._lease: Lease | None = None

    def lock(self) -> str | None:
        """Keeps other processes out until `unlock`, or until this process ends in whatever way.

        A file lock keeps out processes of this machine. The lease does so where locks do not reach: for other machines
        on a shared file system.

        Returns:
            Whom the directory was taken over from: a process that died in it; None: nobody.

        Raises:
            DataError: another live process holds the directory.
            UsageError: the directory cannot be made or written to.
        """
        assert self._lock is None, "the run directory is locked already"
        descriptor = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            taken_over = self._take(descriptor)
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            raise UsageError(
                f"run.output_dir: {self.root} cannot be written ({error.strerror}); choose a folder that can"
            ) from None
        except DataError:
            assert descriptor is not None
            os.close(descriptor)
            raise
        self._lock = descriptor
        return taken_over

    def _take(self, descriptor: int) -> str | None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise DataError(f"{self.root}: in use by {holder}; wait until it ends or choose another run.name") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            # The file system knows no locks, and the lease alone decides.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{Holder.here()}\n".encode(), 0)
        living, note = living_holder(self._lease_file, now=os.fstat(descriptor).st_mtime)
        if living is not None:
            os.ftruncate(descriptor, 0)
            raise DataError(f"{self.root}: in use by {living} ({note}); wait until it ends or choose another run.name")
        self._lease = Lease(self._lease_file)
        return note

    def unlock(self) -> None:
        """Lets the next process in."""
        assert self._lock is not None, "the run directory is not locked"
        assert self._lease is not None
        self._lease.release()
        os.close(self._lock)
        self._lock = self._lease = None

    @property
    def mark(self) -> str:
        """Tells this folder, while a process holds it, from one of the same name on another disk.

        Raises:
            OSError: nobody does, or the lease cannot be read.
        """
        return self._lease_file.read_text(encoding="utf-8", errors="replace")

    def check_held(self) -> None:
        """Asked before anything is written that another process may have taken over: nothing of its run is touched.

        Raises:
            DataError: it has.
        """
        if not self.is_held:
            raise DataError(
                f"{self.root}: this process gave no sign of life for some minutes (was it, or its machine, stopped?) "
                "and the directory was taken over by another one; nothing more is written from here, and the other one "
                "goes on"
            )

    @property
    def is_held(self) -> bool:
        """Whether what is written here belongs to this process's run."""
        return self._lease is None or self._lease.is_held

    def write_status(self, state: str, *, exit_code: int | None = None, facts: Mapping[str, Any] | None = None) -> None:
        """Replaces `status.json`, unless it is another process's by now; a reader sees the old or the new one.

        Args:
            state: such as running, finished, stopped, diverged or failed.
            exit_code: None while the run goes on.
            facts: further JSON values, such as the step and the message.
        """
        if not self.is_held:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_json(self.status, {"state": state, "exit_code": exit_code, "time": now, **(facts or {})})
        except OSError as error:
            if not is_full(error):
                raise
            # The run may still go on, or has a more important thing to say.
            _log.warning("%s: cannot be written (%s)", self.status, error.strerror)

    def read_status(self) -> dict[str, Any]:
        """What `write_status` wrote last; empty if there is none that can be read."""
        return read_json(self.status)


def unused(folder: Path) -> Path:
    """The first of `folder`, `folder-2`, `folder-3` ... that is not there yet."""
    found, number = folder, 1
    while exists(found):  # unlike Path.exists, false where it may not be seen
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def environment(device_name: str) -> dict[str, Any]:
    """Versions and hardware that the numbers of a run depend on; nothing of the environment variables."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "device": device_name,
        "cpu_count": os.cpu_count(),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that `path` holds; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by standard JSON, durably and in one step.

    Raises:
        ValueError: a number is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces `path` durably and in one step: after a crash it holds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync_folder(path: Path) -> None:
    """Makes a folder durable, with all files and folders in it."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Makes a file durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
