"""The folder of one run: where each file is, durable writes, and the lock that keeps a second process out."""

import fcntl
import json
import os
import platform
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vamo_ft.core.errors import DataError, UsageError

__all__ = ["RunDirectory", "environment", "sync_directory", "write_json", "write_text"]

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
        self._lock: int | None = None

    def lock(self) -> None:
        """Keeps other processes out until `unlock`, or until this process ends in whatever way.

        Raises:
            DataError: another live process holds the directory.
            UsageError: the directory cannot be made or written to.
        """
        assert self._lock is None, "the run directory is locked already"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"run.output_dir: {self.root} cannot be written ({error.strerror}); choose a folder that can"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise DataError(f"{self.root}: in use by {holder}; wait until it ends or choose another run.name") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = descriptor

    def unlock(self) -> None:
        """Lets the next process in."""
        assert self._lock is not None, "the run directory is not locked"
        os.close(self._lock)
        self._lock = None

    def write_status(self, state: str, *, exit_code: int | None = None, facts: Mapping[str, Any] | None = None) -> None:
        """Replaces `status.json`; a reader sees the old or the new one, never a part.

        Args:
            state: such as running, finished, stopped, diverged or failed.
            exit_code: None while the run goes on.
            facts: further JSON values, such as the step and the message.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.status, {"state": state, "exit_code": exit_code, "time": now, **(facts or {})})

    def read_status(self) -> dict[str, Any] | None:
        """What `write_status` wrote last; None if there is none that can be read."""
        try:
            status = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return status if isinstance(status, dict) else None


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
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
