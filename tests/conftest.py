"""No test reaches the network, none depends on the order it runs in, and several run at the same time."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # measurements on a device have it to themselves

import pytest
import torch

from tests.workspace import MEZO, Workspace

torch.set_num_threads(1)  # tiny tensors; threads would only wait for each other

MOST_WORKERS = 8  # of a GiB each; with more, the longest tests are all there is to wait for
FILES_PER_WORKER = 4  # a worker takes some seconds to start


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One for each core. 0, which is no process but this one, for few files, for `-k`, and for tests of a device."""
    if config.option.keyword or "gpu" in config.option.markexpr.replace("not gpu", ""):
        return 0
    chosen = [Path(argument.partition("::")[0]) for argument in config.args]
    files = sum(1 if path.is_file() else sum(1 for _ in path.rglob("test_*.py")) for path in chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, files // FILES_PER_WORKER, MOST_WORKERS)
    return workers if workers > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that none is left when the rest is done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("caches")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = next(caches)
    folder.mkdir()
    monkeypatch.setenv("VAMO_FT_CACHE", str(folder))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


@pytest.fixture
def trained(workspace: Workspace) -> Workspace:
    """After a run of MeZO, with no evaluation."""
    workspace.configure(MEZO)
    assert workspace.train() == 0
    return workspace
