"""A checkpoint that several processes write together, played by threads."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from vamo_ft.core.errors import SaveError
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.sharding import Part
from vamo_ft.training import shared_saving
from vamo_ft.training.checkpoint import open_checkpoint, save_checkpoint
from vamo_ft.training.shared_saving import save_together

OWNERS = [{"rule": {"moment": Part(torch.arange(3.0) + 3 * rank, 0, 6)}} for rank in range(2)]


class Pair:
    """What two processes tell each other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.said: queue.Queue[Any] = queue.Queue()
        self.flags = [False, False]


class Half(LocalRuntime):
    """One of two processes."""

    def __init__(self, rank: int, pair: Pair) -> None:
        super().__init__()
        self.rank, self.pair, self.is_main = rank, pair, rank == 0

    @property
    def share(self) -> tuple[int, int]:
        return self.rank, 2

    def agreed(self, value: Any) -> Any:
        if self.is_main:
            self.pair.said.put(value)
            return value
        return self.pair.said.get(timeout=20)

    def any(self, flag: bool) -> bool:
        self.pair.flags[self.rank] = flag
        self.pair.barrier.wait()
        found = any(self.pair.flags)
        self.pair.barrier.wait()
        return found


class Replica(Half):
    """One of two processes that both hold the whole."""

    @property
    def share(self) -> tuple[int, int]:
        return 0, 1


def saved_by_both(root: Path, kind: type[Half] = Half, **changes: Any) -> list[BaseException | None]:
    """What each of the two says."""
    pair, processes = Pair(), kind(0, Pair()).share[1]

    def save(write_others: Callable[[Path], None]) -> None:
        arguments: dict[str, Any] = {"save_model": lambda folder: None, "facts": {}, "keep": 1, **changes}
        save_checkpoint(root, step=2, owners=OWNERS[0], write_others=write_others, processes=processes, **arguments)

    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(save_together, kind(rank, pair), OWNERS[rank], save) for rank in range(2)]
        return [half.exception(timeout=30) for half in halves]


def test_both_parts_are_in_the_checkpoint(tmp_path: Path) -> None:
    assert saved_by_both(tmp_path) == [None, None]
    checkpoint = open_checkpoint(tmp_path / "step-00000002")
    assert checkpoint.load("rule")["moment"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_part_that_cannot_be_written_fails_the_checkpoint_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_saving, "write_parts", full)
    first, second = saved_by_both(tmp_path)
    assert isinstance(first, SaveError)
    assert "another process could not write its part of the checkpoint" in str(first)
    assert str(second) == str(first)
    assert list(tmp_path.iterdir()) == []


def test_of_replicas_one_writes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shared_saving, "write_parts")
    assert saved_by_both(tmp_path, Replica) == [None, None]
    assert open_checkpoint(tmp_path / "step-00000002").step == 2


@pytest.mark.parametrize("kind", [Half, Replica])
def test_a_checkpoint_that_cannot_begin_fails_for_both(kind: type[Half], tmp_path: Path) -> None:
    """Otherwise the main process alone would try again, with `checkpoint.on_error: continue`."""
    first, second = saved_by_both(tmp_path, kind, model_bytes=10**18)
    assert isinstance(first, SaveError)
    assert isinstance(second, SaveError)
    assert "are missing" in str(first)
    assert str(second) == str(first)
