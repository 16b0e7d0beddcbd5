"""The command line without a model: arguments, exit codes, and what is not loaded."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vamo_ft
from tests.config.examples import VALID
from vamo_ft.cli import main, run
from vamo_ft.core.errors import DataError, DeviceMemoryError, DivergenceError, StopRequested
from vamo_ft.training.heartbeat import OF_A_CONNECTION

Command = Callable[..., None]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(VALID, encoding="utf-8")


def _replace(monkeypatch: pytest.MonkeyPatch, name: str, command: Command) -> None:
    module = ModuleType(f"vamo_ft.commands.{name}")
    setattr(module, name, command)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def _raise(error: BaseException) -> Command:
    def command(*_: Any, **__: Any) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("train.jsonl:3: not JSON"), 2, "error: train.jsonl:3: not JSON\n"),
        (DivergenceError("the loss is nan"), 3, "error: the loss is nan\n"),
        (DeviceMemoryError("out of memory"), 4, "error: out of memory\n"),
        (StopRequested("stopped by SIGTERM; run again"), 75, "stopped by SIGTERM; run again\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            KeyError("x"),
            1,
            "unexpected error: KeyError: 'x' (run again with --debug for the traceback)\n",
        ),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _replace(monkeypatch, "train", _raise(error))
    assert run(["train", "config.yaml"]) == code
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _replace(monkeypatch, "train", _raise(KeyError("x")))
    assert run(["--debug", "train", "config.yaml"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("KeyError: 'x'\n")
    _replace(monkeypatch, "train", _raise(DataError("bad")))
    assert run(["--debug", "train", "config.yaml"]) == 2
    assert capsys.readouterr().err.endswith("DataError: bad\nerror: bad\n")


def test_arguments_reach_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    _replace(monkeypatch, "train", lambda load, **options: calls.append((load().run.name, options)))
    for name in ("evaluate", "export"):
        _replace(monkeypatch, name, lambda config, **options: calls.append((config.run.name, options)))
    assert run(["train", "config.yaml"]) == 0
    assert (
        run(["train", "config.yaml", "--set", "run.name=b", "--set", "run.seed=2", "--resume", "never", "--fresh"]) == 0
    )
    Path("runs/a/model").mkdir(parents=True)
    Path("runs/a/checkpoints/step-00000002/model").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text(Path("config.yaml").read_text())
    assert run(["evaluate", "runs/a", "--data", "d.csv", "--predictions", "p.jsonl", "--set", "run.name=c"]) == 0
    assert run(["evaluate", "runs/a/checkpoints/step-00000002"]) == 0
    Path("runs/a/seedlog.bin").touch()
    assert run(["export", "runs/a", "out", "--merge"]) == 0
    assert run(["export", "runs/a", "out", "--from-seedlog", "base", "--steps", "3"]) == 0
    written = ["--dtype", "bfloat16", "--max-shard-size", "1MB", "--push-to-hub", "a/b", "--private"]
    assert run(["export", "runs/a", "out", *written]) == 0
    as_is = {"dtype": None, "max_shard_size": None, "push_to_hub": None, "private": False}
    exported = {"out": Path("out"), "base": None, "steps": None, "merge": False, **as_is}
    plain = {"allow_changes": False, "use_cache": True, "ends_process": False}
    assert calls == [
        ("demo", {"resume": "auto", "fresh": False, **plain}),
        ("b", {"resume": "never", "fresh": True, **plain}),
        ("c", {"model": Path("runs/a/model"), "data": "d.csv", "use_cache": True, "predictions": Path("p.jsonl")}),
        (
            "demo",
            {
                "model": Path("runs/a/checkpoints/step-00000002/model"),
                "data": None,
                "use_cache": True,
                "predictions": None,
            },
        ),
        ("demo", {**exported, "source": Path("runs/a/model"), "merge": True}),
        ("demo", {**exported, "source": Path("runs/a/seedlog.bin"), "base": "base", "steps": 3}),
        (
            "demo",
            {
                **exported,
                "source": Path("runs/a/model"),
                "dtype": "bfloat16",
                "max_shard_size": "1MB",
                "push_to_hub": "a/b",
                "private": True,
            },
        ),
    ]


def test_offline_is_known_before_the_libraries_load(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    _replace(monkeypatch, "train", lambda config, **options: seen.append(os.environ.get("HF_HUB_OFFLINE")))
    monkeypatch.setattr(os, "environ", {})
    assert run(["train", "config.yaml"]) == 0
    assert run(["train", "config.yaml", "--set", "run.offline=true"]) == 0
    assert seen == [None, "1"]


def test_every_line_of_a_config_error_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "config.yaml", "--set", "training.steps=x", "--set", "method.probs=2"]) == 2
    assert capsys.readouterr().err == (
        "error: --set method.probs: unknown key. Did you mean 'probes'?\n"
        "error: --set training.steps: must be a whole number, not 'x'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "config.yaml", "--sett", "a=1"], "No such option"),
        ([], "Commands:"),
    ],
)
def test_usage_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err + printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "c.yaml", "training.steps=5"], "an override is written as --set training.steps=5\n"),
        (["train", "c.yaml", "--training.steps=5"], "an override is written as --set training.steps=5\n"),
        (["train", "c.yaml", "--set", "a.b=1", "run.name=x y"], "an override is written as --set run.name=x y\n"),
        (["train", "--set", "training.steps=5", "c.yaml", "more"], "argument(s) (more)\n"),
        (["train", "--set", "training.steps=5"], "Missing argument 'CONFIG'.\n"),
    ],
)
def test_overrides_as_other_programs_take_them(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().err.endswith(hint)


def test_main_exits_with_the_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vamo-ft", "--version"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capsys.readouterr().out == "vamo-ft 0.1.0\n"
    monkeypatch.setattr(sys, "argv", ["vamo-ft", "validate", "gone.yaml"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: gone.yaml: no such file; 'vamo-ft init' writes one to start from\n"


def test_main_leaves_the_interpreter_no_thread_that_may_abort_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a library, where it waits for a process that was lost."""
    never, codes = threading.Event(), []
    waiting = threading.Thread(target=never.wait, name=OF_A_CONNECTION, daemon=True)
    waiting.start()
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "argv", ["vamo-ft", "validate", "gone.yaml"])
    with pytest.raises(SystemExit):
        main()
    never.set()
    waiting.join()
    assert codes == [2]
    with pytest.raises(SystemExit):
        main()
    assert codes == [2]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(vamo_ft.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_light_commands_load_nothing_heavy() -> None:
    script = """
import sys
from vamo_ft.cli import run

def check(arguments, heavy):
    assert run(arguments) == 0, arguments
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, (arguments, loaded)

models = ["torch", "transformers", "datasets", "peft", "accelerate", "numpy"]
check(["--help"], [*models, "pydantic", "yaml", "rich"])
check(["train", "--help"], [*models, "yaml", "rich"])
check(["validate", "config.yaml"], [*models, "rich"])
check(["init", "--out", "new.yaml"], [*models, "rich"])
check(["methods"], models)
"""
    done = _python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "config.yaml is valid" in done.stdout


def test_module_form() -> None:
    done = _python("-m", "vamo_ft", "validate", "gone.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: gone.yaml: no such file")
