"""A checkpoint that several processes write together, played by threads."""

import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.sharding import Part
from vamo_ft.training import shared_saving
from vamo_ft.training.checkpoint import open_checkpoint, save_checkpoint
from vamo_ft.training.shared_saving import newest_together, save_together

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


def chosen_by_both(roots: tuple[Path, Path]) -> list[Any]:
    """What each of two processes finds that look into a folder of their own; the exception of one that fails."""
    pair = Pair()
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(newest_together, Half(rank, pair), roots[rank]) for rank in range(2)]
        return [half.exception(timeout=30) or half.result() for half in halves]


def written(root: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(root, step=step, owners={}, save_model=lambda directory: None, facts={}, keep=9)
    return root


def test_all_take_the_checkpoint_that_the_main_process_chooses(tmp_path: Path) -> None:
    """Also one that sees a newer one, as on a file system that tells late what was removed."""
    main, other = written(tmp_path / "main", 2), written(tmp_path / "other", 2, 4)
    first, second = chosen_by_both((main, other))
    assert (first.path, second.path) == (main / "step-00000002", other / "step-00000002")
    assert chosen_by_both((tmp_path, other)) == [None, None]


def test_a_checkpoint_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = written(tmp_path / "main", 2, 4), written(tmp_path / "other", 2)
    monkeypatch.setattr(shared_saving.time, "sleep", lambda seconds: written(other, 4))
    assert [found.step for found in chosen_by_both((main, other))] == [4, 4]


def test_a_checkpoint_that_is_not_seen_is_an_error_with_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_saving, "VISIBLE_SECONDS", 0.0)
    main, other = written(tmp_path / "main", 2, 4), written(tmp_path / "other", 2)
    first, second = chosen_by_both((main, other))
    assert first.step == 4
    assert isinstance(second, DataError)
    assert str(second) == (
        f"on {socket.gethostname()}, unlike for the first process: {other / 'step-00000004'}: there is no such "
        "checkpoint"
    )
