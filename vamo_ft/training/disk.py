"""What does not fit on a disk, and how much of it is missing."""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vamo_ft.core.errors import SaveError

__all__ = ["disk_error", "folder_bytes", "free_bytes", "full_disk_explained", "gigabytes", "is_full", "write_rate"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MIB = 1 << 20
_NATIVE = re.compile(r"\(os error (\d+)\)")


def disk_error(error: Exception) -> OSError | None:
    """The system's error behind `error`, if it is or reports one.

    Libraries that are not written in Python report it as text at the end of an exception of their own.
    """
    if isinstance(error, OSError):
        return error
    if (found := _NATIVE.search(str(error))) is None:
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])))


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit on the size of files has no more room."""
    return error.errno in _FULL


@contextmanager
def full_disk_explained(root: Path) -> Iterator[None]:
    """Turns what a full disk makes of any write to a run directory into one line.

    Raises:
        SaveError: the block found no room.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SaveError) or (cause := disk_error(error)) is None or not is_full(cause):
            raise
        raise SaveError(
            f"{root}: no room to write ({cause.strerror}; {gigabytes(free_bytes(root))} are free); the checkpoints "
            "stay: make room, and train again with the same settings to go on"
        ) from error


def free_bytes(path: Path) -> int:
    """Free space where `path` is, or would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def folder_bytes(path: Path) -> int:
    """Size of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def gigabytes(size: int) -> str:
    """Such as `1.250 GB`."""
    return f"{size / 1e9:.3f} GB"


def write_rate(path: Path) -> float:
    """Bytes a second at which the disk of `path`, or of its nearest folder that exists, takes 32 MiB for good.

    Raises:
        SaveError: nothing can be written there.
    """
    while not path.exists():
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            began = time.perf_counter()
            for _ in range(32):
                file.write(os.urandom(_MIB))
            file.flush()
            os.fsync(file.fileno())
            return 32 * _MIB / (time.perf_counter() - began)
    except OSError as error:
        raise SaveError(f"{path}: cannot be written to ({error.strerror}); choose another run.output_dir") from error
