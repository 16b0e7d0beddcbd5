"""Disks without room, for tests."""

import ctypes
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@contextmanager
def small_disk(path: Path, *, size: int) -> Iterator[Path]:
    """A file system of its own at `path`; skips the test where this process may not mount one."""
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    try:
        yield path
    finally:
        libc.umount2(os.fsencode(path), 2)  # detached even if a file is open


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes; a write beyond fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))


def fill(folder: Path, *, leave: int) -> Path:
    """A file that takes all but `leave` bytes of the file system."""
    ballast = folder / "ballast"
    free = shutil.disk_usage(folder).free
    with ballast.open("wb") as file:
        for _ in range((free - leave) // 4096):
            file.write(bytes(4096))
    return ballast
