"""Who tells of the failure of a process other than the main one; real processes are in tests/test_processes.py."""

from typing import Any

import pytest

from vamo_ft.core.errors import DataError
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
