"""Who tells of the failure of a process other than the main one; real processes are in tests/test_processes.py."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vamo_ft.core.errors import DataError, ProcessLostError
from vamo_ft.training import processes as module
from vamo_ft.training.processes import Processes


class Store:
    """The launcher's."""

    def __init__(self, *, done: bool | None) -> None:
        self.done = done
        self.notes: list[str] = []

    def check(self, keys: list[str]) -> bool:
        if self.done is None:
            raise RuntimeError("the store is gone")
        return self.done

    def compare_set(self, key: str, expected: str, note: str) -> None:
        self.notes.append(note)

    def add(self, key: str, number: int) -> int:
        return 0


class Second(Processes):
    """One of two, which are not connected."""

    def __init__(self, store: Any) -> None:
        self.rank, self.count, self._store, self._host, self._heartbeat = 1, 2, store, None, None
        self._store_answers = True


@pytest.mark.parametrize(("done", "raised"), [(True, SystemExit), (None, SystemExit), (False, DataError)])
def test_the_main_process_tells_of_a_failure_unless_it_is_busy(
    done: bool | None, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENDING_SECONDS", 0.0)
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda *group: None)
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: None)
    store = Store(done=done)
    with pytest.raises(raised) as caught, Second(store).ending_together():
        raise DataError("data.train.path: there is no such file")
    assert store.notes == ['[2, "process 1: data.train.path: there is no such file"]']
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2


def test_a_store_without_an_answer_is_asked_once_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine lost its power just now, which no sign of life has told yet."""
    asked, never = [], threading.Event()

    def wait(key: str, expected: str, note: str) -> None:
        asked.append(note)
        never.wait()

    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda *group: None)
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: None)
    store = Store(done=True)
    monkeypatch.setattr(store, "compare_set", wait)
    with pytest.raises(DataError), Second(store).ending_together():  # it cannot know whether the main one tells
        raise DataError("data.train.path: there is no such file")
    never.set()
    assert asked == ['[2, "process 1: data.train.path: there is no such file"]']


def test_that_a_process_was_lost_the_main_one_says_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its last checkpoint, and how the run goes on."""
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda *group: None)
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: None)
    store = Store(done=False)
    monkeypatch.setattr(module, "_ENDING_SECONDS", 0.0)
    second, main = Second(store), Second(store)
    main.rank = 0
    with pytest.raises(ProcessLostError), second.ending_together():
        raise ProcessLostError("another process of the run was lost")
    assert store.notes == []
    main._tell(ProcessLostError("process 2 of the run gave no sign of life"))
    assert store.notes == ['[1, "process 2 of the run gave no sign of life"]']


def test_what_does_not_end_on_the_device_is_not_waited_for_nor_a_signal_handler_set_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forever, ended = threading.Event(), []

    def destroy(*group: Any) -> None:
        ended.append(group)
        if not group:
            forever.wait()

    monkeypatch.setattr(module, "_NOTE_SECONDS", 0.01)
    monkeypatch.setattr(module.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(module.dist, "destroy_process_group", destroy)

    def fail() -> None:
        with Second(Store(done=True)).ending_together():
            raise DataError("data.train.path: there is no such file")

    with ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(fail).exception(timeout=30), SystemExit)
    assert ended == [(None,), ()]  # that of the host, by which others notice, first
    forever.set()


def test_of_nccl_what_is_under_way_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(module.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda group: None)  # the default one's would wait
    aborted = threading.Event()
    monkeypatch.setattr(module.dist.distributed_c10d, "_abort_process_group", aborted.set)
    with pytest.raises(SystemExit), Second(Store(done=True)).ending_together():
        raise DataError("data.train.path: there is no such file")
    assert aborted.is_set()


def test_the_frames_of_an_error_and_of_what_led_to_it_hold_no_connection() -> None:
    class Connection:
        pass

    held: list[weakref.ref[Connection]] = []

    def fail() -> None:
        group = Connection()
        held.append(weakref.ref(group))
        raise RuntimeError("Connection closed by peer")

    def explain() -> None:
        with module.lost_processes_explained():
            fail()

    with pytest.raises(ProcessLostError) as caught:
        explain()
    assert held[0]() is not None
    module._clear_frames(caught.value)
    assert held[0]() is None
    first, second = RuntimeError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first
    module._clear_frames(first)
