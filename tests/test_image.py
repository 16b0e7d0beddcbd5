"""The image's steps, made in a clean folder with a new virtual environment, and runs as its container starts them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.test_dockerfile import is_ignored, parse_dockerfile
from tests.test_process import child_of
from tests.workspace import MEZO, Workspace, merged

ROOT = Path(__file__).resolve().parent.parent
USER = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")
PID_ONE = ("unshare", "--pid", "--fork", "--mount-proc")


class Image:
    """A folder that stands for the root of the image's file system.

    Paths below /opt, /cache and /workspace lead there. Packages of the system are those of this machine.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root
        self.entrypoint: list[str] = []
        self.command: list[str] = []
        self.packages: list[str] = []
        kept = {name: value for name, value in os.environ.items() if re.match(r"PIP_|SSL_|LANG|https?_proxy", name)}
        self.environment = {**kept, "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin", "HOME": str(root / "root")}

    def inside(self, text: str) -> str:
        return re.sub(r"(?<![\w.}-])/(?=(?:opt|cache|workspace)\b)", f"{self.root}/", text)

    def build(self, instructions: Sequence[tuple[str, str]], context: Path, patterns: list[str]) -> None:
        for instruction, rest in instructions:
            match instruction:
                case "FROM" | "USER":
                    pass
                case "ARG":
                    name, _, value = rest.partition("=")
                    self.environment[name] = os.environ.get(name, value)
                case "ENV":
                    for name, value in re.findall(r"(\w+)=(\S+)", rest):
                        self.environment[name] = self.inside(value).replace("$PATH", self.environment["PATH"])
                case "RUN" if rest.startswith("apt-get update"):
                    self.packages += [word for word in rest.split() if re.fullmatch(r"[a-z0-9+.-]+", word)]
                case "RUN":
                    subprocess.run(
                        ["bash", "-euc", self.inside(rest)], cwd=self.folder, env=self.environment, check=True
                    )
                case "COPY":
                    *sources, target = rest.split()
                    for source in sources:
                        self._copy(context, source, Path(self.inside(target)), patterns)
                case "WORKDIR":
                    self.folder = Path(self.inside(rest))
                    self.folder.mkdir(parents=True, exist_ok=True)
                case "ENTRYPOINT":
                    self.entrypoint = json.loads(rest)
                case "CMD":
                    self.command = json.loads(rest)
                case _:
                    raise AssertionError(f"what does {instruction} do?")

    def container(self, *command: str) -> "subprocess.Popen[str]":
        """The entry point as `docker run` starts it: process number 1, not root."""
        entry = [*self.entrypoint, *(command or self.command)]
        if shutil.which("tini") is None:
            entry = entry[entry.index("--") + 1 :]
        return subprocess.Popen(
            [*PID_ONE, *USER, *entry],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _copy(self, context: Path, source: str, target: Path, patterns: list[str]) -> None:
        found = context / source
        files = [found] if found.is_file() else [path for path in found.rglob("*") if path.is_file()]
        for file in files:
            if not is_ignored(file.relative_to(context), patterns):  # type: ignore[arg-type]
                place = target / (file.name if file == found else file.relative_to(found))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    if "VAMO_FT_TEST_IMAGE" not in os.environ:
        pytest.skip("VAMO_FT_TEST_IMAGE is not set; it installs torch and all packages, for minutes")
    if subprocess.run([*PID_ONE, *USER, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a container's process needs root, unshare and setpriv here")
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        made = Image(Path(folder))
        made.root.chmod(0o755)
        made.build(
            parse_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8")),
            ROOT,
            [line for line in lines if line and not line.startswith("#")],
        )
        yield made


def configuration() -> Mapping[str, object]:
    return merged(MEZO, {"training": {"steps": 100_000}, "logging": {"every": "1 steps"}})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_container_says_what_it_can_do(image: Image) -> None:
    process = image.container()
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert "train" in output and "validate" in output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_container_is_stopped_and_the_same_command_goes_on(image: Image) -> None:
    workspace = Workspace(image.root / "workspace")
    config = workspace.configure(configuration())
    subprocess.run(["chmod", "--recursive", "a+rX", workspace.root], check=True)
    seen = 0
    for _ in range(2):
        with image.container("train", config) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if (found := re.match(r"step (\d+) ", line)) and int(found[1]) >= seen + 3:
                    os.kill(child_of(process), signal.SIGTERM)
                    break
            error = process.stderr.read()
        assert process.returncode == 75, error
        steps = [line["step"] for line in workspace.metrics()]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= seen + 3
        seen = len(steps)
    assert {path.stat().st_uid for path in workspace.directory().rglob("*")} == {1000}
    assert not (ROOT / "runs" / "tiny").exists()
