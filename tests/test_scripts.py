"""The shell scripts: their form, and what `scripts/setup` does, with a stand-in for Python that installs nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_xdist_auto_num_workers

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    ROOT / ".ci" / "run",
    *(ROOT / "scripts" / name for name in ("setup", "test", "check", "quickstart", "paper")),
]

PYTHON = """\
#!/bin/sh
# Answers as Python does, writes down what it was asked to do, and fails when $FAIL_AT is in it.
case "$*" in
    "-c "*) echo "${FAKE_VERSION:-3.12.1}"; [ -z "$FAKE_VERSION" ]; exit ;;
    "-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
echo "$*" >> "$LOG"
case "$*" in *"${FAIL_AT:-nothing}"*) exit 1 ;; esac
"""
CREATE = ["-m venv --clear .venv", "-m pip install -qq torch==2.13.0"]
INSTALL = ["-m pip install -qq --editable .[test]"]


class Checkout:
    """A copy of the scripts with a Python that only takes notes."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a checkout"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "pyproject.toml").write_text("first")
        self.python = root / "python3"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        self._log = root / "log"

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), "LOG": str(self._log)} | variables
        command = [str(self.root / "scripts" / script), *arguments]
        return subprocess.run(command, cwd="/", env=environment, text=True, capture_output=True, check=False)

    def done(self, script: str = "setup", *arguments: str, **variables: str) -> list[str]:
        """What Python was asked to do by one run."""
        self._log.write_text("")
        self.run(script, *arguments, **variables)
        return self._log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_form(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


def test_one_default_torch_everywhere() -> None:
    places = [
        *SCRIPTS,
        ROOT / "Dockerfile",
        ROOT / ".github" / "workflows" / "ci.yml",
        ROOT / ".github/CONTRIBUTING.md",
    ]
    found = {path.name: re.findall(r"torch==([\d.]*\d)", path.read_text(encoding="utf-8")) for path in places}
    assert {"setup", "Dockerfile"} <= {name for name, versions in found.items() if versions}
    assert {version for versions in found.values() for version in versions} == {"2.13.0"}


def test_ci_runs_the_scripts() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["scripts/check", "scripts/test"]
    assert "- run: .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_setup_installs_torch_first_and_does_nothing_the_second_time(checkout: Checkout) -> None:
    assert checkout.done() == CREATE + INSTALL
    assert checkout.done() == []


def test_setup_installs_again_when_the_project_changes(checkout: Checkout) -> None:
    checkout.done()
    (checkout.root / "pyproject.toml").write_text("second")
    assert checkout.done() == INSTALL
    assert checkout.done() == []


def test_setup_starts_anew_for_another_torch_and_another_place(checkout: Checkout) -> None:
    checkout.done()
    assert checkout.done(TORCH_SPEC="torch==9") == [CREATE[0], "-m pip install -qq torch==9", *INSTALL]
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.done(TORCH_SPEC="torch==9")[0] == CREATE[0]


@pytest.mark.parametrize("place", ["venv", "torch", "editable"])
def test_setup_repairs_what_was_interrupted(checkout: Checkout, place: str) -> None:
    assert checkout.run("setup", FAIL_AT=place).returncode != 0
    assert checkout.done() == CREATE + INSTALL
    assert checkout.done() == []


def test_setup_repairs_an_interrupted_update(checkout: Checkout) -> None:
    checkout.done()
    (checkout.root / "pyproject.toml").write_text("second")
    checkout.done(FAIL_AT="editable")
    (checkout.root / "pyproject.toml").write_text("first")
    assert checkout.done() == CREATE + INSTALL


def test_setup_refuses_an_old_or_missing_python(checkout: Checkout) -> None:
    for variables in ({"FAKE_VERSION": "3.10.4"}, {"PYTHON": "/nowhere/python3"}):
        result = checkout.run("setup", **variables)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("scripts/setup: ")
        assert "Python 3.11 or newer is needed" in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_test_hands_its_arguments_to_pytest(checkout: Checkout) -> None:
    checkout.done()
    assert checkout.done("test", "tests/a b.py", "-x") == [
        "-m pytest --numprocesses auto --dist worksteal tests/a b.py -x"
    ]


@pytest.mark.parametrize(
    ("cores", "chosen", "workers"),
    [
        (1, {}, 0),
        (2, {}, 2),
        (8, {}, 8),
        (64, {}, 8),
        (64, {"args": ["tests/core"]}, 5),
        (64, {"args": ["tests/core/test_0.py", "tests/core/test_1.py::test_x"]}, 0),
        (64, {"keyword": "vamo"}, 0),
        (64, {"markexpr": "gpu and not slow"}, 0),
        (64, {"markexpr": "not gpu"}, 8),
    ],
)
def test_a_worker_for_a_core_unless_few_tests_are_chosen(
    cores: int, chosen: dict[str, Any], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("core", "data"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "tests" / folder / f"test_{number}.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    options = {"args": ["tests"], "keyword": "", "markexpr": "", **chosen}
    config: Any = SimpleNamespace(args=options.pop("args"), option=SimpleNamespace(**options))
    assert pytest_xdist_auto_num_workers(config) == workers


def test_paper_hands_its_arguments_on(checkout: Checkout) -> None:
    checkout.done()
    assert checkout.done("paper", "--quick", "--out", "a b") == ["-m scripts.paper_figures --quick --out a b"]


def test_plan_check_hands_its_arguments_on(checkout: Checkout) -> None:
    checkout.done()
    assert checkout.done("plan_check", "--model", "a b") == ["-m scripts.plan_checks --model a b"]


def test_quickstart_prepares_trains_and_tells_what_is_next(checkout: Checkout) -> None:
    checkout.done()
    program = checkout.root / ".venv" / "bin" / "vamo-ft"
    program.write_text('#!/bin/sh\necho "vamo-ft $*" >> "$LOG"\nexit "${TRAIN_EXIT:-0}"\n')
    program.chmod(0o755)
    assert checkout.done("quickstart") == ["scripts/prepare_quickstart.py", "vamo-ft train configs/quickstart.yaml"]
    assert "vamo-ft methods" in checkout.run("quickstart").stdout
    stopped = checkout.run("quickstart", TRAIN_EXIT="75")
    assert stopped.returncode == 75
    assert "vamo-ft methods" not in stopped.stdout
