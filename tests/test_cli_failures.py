"""Whatever happens inside a command, the user sees a line and not a traceback, unless --debug asks for it."""

import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

import vamo_ft
from tests.config.examples import VALID
from vamo_ft.cli import run
from vamo_ft.config.errors import ConfigError
from vamo_ft.core.errors import DataError

Command = Callable[..., None]


class _Unspeakable(Exception):
    """Its message cannot be put together."""

    def __str__(self) -> str:
        raise ValueError("no")


class _Lines(Exception):
    """As some libraries' messages: several lines, and colours."""

    def __str__(self) -> str:
        return "\x1b[31mfirst:\n   second\x1b[0m\n"


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Runs `validate`, which raises the error."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(VALID, encoding="utf-8")

    def fail(error: BaseException, *options: str) -> int:
        def command(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("vamo_ft.commands.validate.validate", command)
        return run([*options, "validate", "config.yaml"])

    return fail


DEBUG = " (run again with --debug for the traceback)\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("broken"), 1, f"unexpected error: RuntimeError: broken{DEBUG}"),
        (AssertionError(), 1, f"unexpected error: AssertionError{DEBUG}"),
        (ModuleNotFoundError("no x"), 1, f"unexpected error: ModuleNotFoundError: no x{DEBUG}"),
        (MemoryError(), 1, f"unexpected error: MemoryError{DEBUG}"),
        (RecursionError("too deep"), 1, f"unexpected error: RecursionError: too deep{DEBUG}"),
        (_Lines(), 1, rf"unexpected error: _Lines: \x1b[31mfirst: second\x1b[0m{DEBUG}"),
        (_Unspeakable(), 1, f"unexpected error: _Unspeakable: its message cannot be shown (ValueError){DEBUG}"),
        (DataError("é\ud800\u2028x\0"), 2, "error: é\\ud800 x\\x00\n"),
        (ConfigError(["a:1: b\nc", "a:2: d"]), 2, "error: a:1: b c\nerror: a:2: d\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(), 0, ""),
        (SystemExit(7), 7, ""),
        (SystemExit("no"), 1, "no\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)  # fmt: skip
def test_every_error_is_lines(
    fail: Callable[..., int], error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(error) == code
    assert capsys.readouterr().err == said


def test_debug_shows_the_traceback_and_its_cause(fail: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    error = DataError("told")
    error.__cause__ = KeyError("cause")
    assert fail(error, "--debug") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("KeyError: 'cause'\n")
    assert "\nTraceback (most recent call last):\n" in printed
    assert printed.endswith("DataError: told\nerror: told\n")
    assert fail(_Unspeakable(), "--debug") == 1
    assert "_Unspeakable" in capsys.readouterr().err


def test_debug_may_stand_behind_the_command(
    fail: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where whoever is told to run again with it writes it."""
    assert fail(KeyError("x")) == 1
    assert "Traceback" not in capsys.readouterr().err
    for arguments in (["validate", "--debug", "config.yaml"], ["validate", "config.yaml", "--debug"]):
        assert run(arguments) == 1
        assert "Traceback (most recent call last):" in capsys.readouterr().err
    assert run(["validate", "--", "--debug"]) == 1  # the name of a file
    assert "Traceback" not in capsys.readouterr().err


def test_a_message_that_the_terminal_cannot_show(fail: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = BytesIO()
    monkeypatch.setattr(sys, "stderr", TextIOWrapper(screen, encoding="ascii", errors="strict"))
    assert fail(DataError("é.jsonl: no rows")) == 2
    assert fail(DataError("é"), "--debug") == 2
    assert run(["validatï"]) == 2
    sys.stderr.flush()
    assert b"error: \\xe9.jsonl: no rows\n" in screen.getvalue()
    assert b"DataError: \\xe9\n\nerror: \\xe9\n" in screen.getvalue()


@pytest.mark.parametrize("state", ["closed", "full"])
def test_nobody_listens(fail: Callable[..., int], monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    class Full(BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        stream = TextIOWrapper(Full() if state == "full" else BytesIO(), write_through=True)
        if state == "closed":
            stream.close()
        patched.setattr(sys, "stderr", stream)
        assert fail(DataError("x")) == 2
        assert fail(KeyError("x")) == 1
        assert fail(KeyError("x"), "--debug") == 1
        assert run(["trian"]) == 2
        if state == "full":
            stream.detach()


# Real processes


def _start(*arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    search = os.environ | {"PYTHONPATH": str(Path(vamo_ft.__file__).parents[1]), "PYTHONUNBUFFERED": ""} | environment
    command = [sys.executable, "-m", "vamo_ft", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=search)


ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}


def test_ascii_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(VALID.replace("some/model", "modèle"), encoding="utf-8")
    process = _start("validate", "config.yaml", **ASCII)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert rb"mod\xe8le" in out
    Path("config.yaml").write_text(VALID.replace("vamo", "modèle"), encoding="utf-8")
    process = _start("validate", "config.yaml", **ASCII)
    _, error = process.communicate()
    assert process.returncode == 2
    assert rb"not 'mod\xe8le'" in error
    assert b"Traceback" not in error and b"Unicode" not in error


@pytest.mark.parametrize("arguments", [["validate", "config.yaml"], ["--help"], ["init", "--out", "new.yaml"]])
def test_output_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(VALID, encoding="utf-8")
    Path("train.jsonl").touch()
    with _start(*arguments) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `| head` does when it has what it wants
        said = process.stderr.read()
    assert said == b""
    assert process.returncode in (0, 1)


def test_an_installation_with_a_part_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(VALID, encoding="utf-8")
    Path("yaml.py").write_text("raise ImportError('no yaml here')")
    process = _start("validate", "config.yaml", PYTHONPATH=f"{tmp_path}:{Path(vamo_ft.__file__).parents[1]}")
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.decode() == f"unexpected error: ImportError: no yaml here{DEBUG}"
