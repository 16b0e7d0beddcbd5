"""When a process that waits for others gives them up; real processes are in tests/test_processes.py."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from vamo_ft.core.errors import ProcessLostError
from vamo_ft.training import heartbeat as module
from vamo_ft.training.heartbeat import Heartbeat

CUT_OFF = "for 0.0005 minutes: its machine lost its power or its network, or it was stopped"


class Store:
    """The launcher's."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.lock = threading.Lock()
        self.gone = False

    def clone(self) -> "Store":
        return self

    def add(self, key: str, number: int) -> int:
        with self.lock:
            if self.gone:
                raise RuntimeError("Connection reset by peer")
            self.counts[key] = self.counts.get(key, 0) + number
            return self.counts[key]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Store, int, int], Heartbeat]]:
    """Starts hearts that beat every hundredth of a second, and give others up after three rounds."""
    monkeypatch.setattr(module, "_BETWEEN", timedelta(seconds=0.01))
    monkeypatch.setattr(module, "_ROUNDS", 3)
    hearts: list[Heartbeat] = []

    def start(store: Store, rank: int, count: int) -> Heartbeat:
        hearts.append(Heartbeat(store, rank, count))
        return hearts[-1]

    yield start
    for heart in hearts:
        heart.stop()


def given_up(heart: Heartbeat, *, within: float = 20.0) -> str | None:
    """What is said of those that are waited for; None where nothing is for that many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        time.sleep(heart.between.total_seconds())
        try:
            heart.check()
        except ProcessLostError as error:
            return str(error)
    return None


def test_a_process_that_counts_no_more_is_given_up_by_the_main_one(started: Callable[..., Heartbeat]) -> None:
    store = Store()
    main, second, third = (started(store, rank, 3) for rank in range(3))
    third.stop()
    assert given_up(main) == f"process 2 of the run gave no sign of life {CUT_OFF}"
    assert given_up(second, within=0.2) is None  # it hears of that from the main one
    started(store, 2, 3)
    while third_is_silent(main):
        time.sleep(0.01)


def third_is_silent(main: Heartbeat) -> bool:
    try:
        main.check()
    except ProcessLostError:
        return True
    return False


def test_a_main_process_that_counts_no_more_is_given_up_by_the_others(started: Callable[..., Heartbeat]) -> None:
    store = Store()
    started(store, 0, 2).stop()
    assert given_up(started(store, 1, 2)) == f"process 0 of the run gave no sign of life {CUT_OFF}"


@pytest.mark.parametrize("silent", [True, False])
def test_a_store_that_does_not_answer_is_no_longer_waited_for(silent: bool, started: Callable[..., Heartbeat]) -> None:
    """It lost its machine, or has ended."""
    store = Store()
    main, second = started(store, 0, 2), started(store, 1, 2)
    if silent:
        store.lock.acquire()
    else:
        store.gone = True
    assert given_up(second) == f"the launcher, in whose store the processes met, gave no answer {CUT_OFF}"
    if silent:
        store.lock.release()
    main.stop()
