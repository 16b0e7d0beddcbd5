"""The process around a run: readers that go away, Ctrl-C at any time, and the first process of a container."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from tests.workspace import MEZO, Workspace
from vamo_ft.commands.console import patient_console

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def started(*arguments: str, before: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[str]"]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-m", "vamo_ft", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


def state_of(workspace: Workspace) -> tuple[str, int]:
    status: dict[str, Any] = json.loads((workspace.directory() / "status.json").read_text())
    return status["state"], status["exit_code"]


def test_a_run_goes_on_when_nobody_reads_what_it_says(workspace: Workspace) -> None:
    """As with `vamo-ft train config.yaml 2>&1 | head -1`."""
    workspace.configure(MEZO)
    with started("train", "config.yaml") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert any("mezo: " in line for line in iter(process.stderr.readline, ""))
        process.stderr.close()
        assert process.wait() == 0
    assert state_of(workspace) == ("finished", 0)


@pytest.mark.parametrize("state", ["closed", "full"])
def test_a_console_without_a_reader_loses_text_and_nothing_else(state: str) -> None:
    class Full(BytesIO):
        def write(self, _: Any) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    stream = TextIOWrapper(Full() if state == "full" else BytesIO(), write_through=True)
    if state == "closed":
        stream.close()
    console = patient_console(stream)
    console.print("x")  # rich ends the process at a broken pipe
    print("x", file=console.file, flush=True)
    assert not console.is_terminal
    if state == "full":
        stream.detach()


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == NAME:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from vamo_ft.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["vamo_ft.cli", "typer", "torch", "vamo_ft.commands.train"])
def test_ctrl_c_while_libraries_load_is_one_word(module: str, workspace: Workspace) -> None:
    workspace.configure(MEZO)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.replace("NAME", repr(module)), "train", "config.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


FIRST = ("unshare", "--pid", "--fork", "--mount-proc")
"""The command becomes process number 1, whose SIGTERM the kernel drops unless there is a handler for it."""


def child_of(process: "subprocess.Popen[str]") -> int:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not (children := path.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return int(children[0])


@pytest.fixture
def first() -> tuple[str, ...]:
    try:
        done = subprocess.run([*FIRST, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode != 0:
        pytest.skip("no process namespaces here")
    return FIRST


def test_a_container_is_stopped_with_a_checkpoint(workspace: Workspace, first: tuple[str, ...]) -> None:
    workspace.configure({**MEZO, "logging": {"every": "1 steps"}})
    with started("train", "config.yaml", "--set", "training.steps=100000", before=first) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 3 "):
                break
        os.kill(child_of(process), signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 75, error
    assert "by SIGTERM; to go on, train tiny again" in error
    assert state_of(workspace) == ("stopped", 75)
    assert workspace.train("--set", f"training.steps={len(workspace.metrics()) + 1}") == 0


def test_a_container_is_stopped_while_libraries_load(workspace: Workspace, first: tuple[str, ...]) -> None:
    workspace.configure(MEZO)
    with started("train", "config.yaml", "--set", "training.steps=100000", before=first) as process:
        child = child_of(process)
        while process.poll() is None:  # until the interpreter is up they are dropped
            os.kill(child, signal.SIGTERM)
            time.sleep(0.05)
        assert process.stderr is not None
        said = process.stderr.read()
    if process.returncode == 75:  # a library swallowed the exit while it was imported; the run heard the next one
        assert "stopped" in said
    else:
        assert (process.returncode, said) == (143, "")
