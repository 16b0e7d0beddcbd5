"""Commands that must be refused, and a process that obeys the permissions of files."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.workspace import Workspace
from vamo_ft.cli import run

__all__ = ["bound_by_permissions", "check_refused"]


def check_refused(workspace: Workspace, message: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    """Runs a command, `train config.yaml` if none is given, that must say `message` and nothing else, with exit code 2.

    In `message`, {root} is the workspace's folder. Warnings of paths that do not exist, and what is told of
    the cache of tokens, are not looked at.
    """
    capsys.readouterr()
    assert run(arguments or ["train", "config.yaml"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("tokens: ")]
    said = [line for line in lines if "(relative paths start in" not in line]
    assert said == [f"error: {line}" for line in message.replace("{root}", str(workspace.root)).split("\n")]
    assert captured.out == ""


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Root may read and write everything; in the block this thread gives that capability up (Linux)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "capget"):
        pytest.skip("no capabilities here")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    before, now = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    for sets in (before, now):
        if libc.capget(header, sets) != 0:
            pytest.skip("capabilities cannot be read")
    now[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, of the effective ones
    if libc.capset(header, now) != 0:
        pytest.skip("capabilities cannot be given up")
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
