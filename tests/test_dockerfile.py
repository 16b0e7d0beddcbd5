"""The Dockerfile, read as Docker reads it: it cannot be built in a test."""

import json
import re
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent


def parse_dockerfile(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined; comments are dropped, also between continued lines."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def is_ignored(path: PurePosixPath, patterns: list[str]) -> bool:
    """The last pattern that matches the path or a folder above it decides; `!` takes it back in."""
    ignored = False
    for pattern in patterns:
        if any(candidate.match(pattern.lstrip("!")) for candidate in (path, *path.parents[:-1])):
            ignored = not pattern.startswith("!")
    return ignored


def pip_installs(commands: str) -> list[list[str]]:
    """The arguments of each `pip install`, without where the package comes from, its extras and `--editable`."""
    found = re.findall(r"-m pip install (.*)", commands)
    return [[re.sub(r"^'\.(\[.*\])'$", ".", word) for word in line.split() if word != "--editable"] for line in found]


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    return parse_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def arguments(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in instructions if instruction == name]


def test_every_copied_file_exists_and_reaches_the_build(instructions: list[tuple[str, str]]) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    sources = [word for rest in arguments(instructions, "COPY") for word in rest.split()[:-1]]
    assert {"vamo_ft", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not is_ignored(PurePosixPath(source), patterns), source
    for unwanted in ("data/quickstart/train.jsonl", ".venv/bin/python", ".git/config", "vamo_ft/core/__pycache__"):
        assert is_ignored(PurePosixPath(unwanted), patterns), unwanted


def test_the_build_holds_what_pyproject_needs(instructions: list[tuple[str, str]]) -> None:
    needed = re.findall(
        r'^(?:readme|license-files) = \[?"([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert len(needed) == 2
    assert set(needed) <= set(" ".join(arguments(instructions, "COPY")).split())


def test_the_process_is_not_root_and_gets_its_signals(instructions: list[tuple[str, str]]) -> None:
    assert arguments(instructions, "USER")[-1].partition(":")[0] not in ("root", "0")
    assert [json.loads(rest) for rest in arguments(instructions, "ENTRYPOINT")] == [["tini", "--", "vamo-ft"]]
    assert " tini" in " ".join(arguments(instructions, "RUN"))


def test_the_package_is_outside_the_mount_points(instructions: list[tuple[str, str]]) -> None:
    assert arguments(instructions, "WORKDIR")[-1] == "/workspace"
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments(instructions, "ENV"))))
    assert environment["PATH"] == "/opt/vamo-ft/bin:$PATH"
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        assert PurePosixPath(environment[name]).is_relative_to("/cache")


def test_it_installs_as_the_scripts_do(instructions: list[tuple[str, str]]) -> None:
    setup = (ROOT / "scripts" / "setup").read_text(encoding="utf-8")
    installs = pip_installs("\n".join(arguments(instructions, "RUN")))
    assert installs == pip_installs(setup) == [["-qq", '"$TORCH_SPEC"'], ["-qq", "."]]


def test_parsing_joins_continued_lines() -> None:
    text = "# top\nRUN a \\\n    # between\n    && b\n\nuser me\n"
    assert parse_dockerfile(text) == [("RUN", "a && b"), ("USER", "me")]
