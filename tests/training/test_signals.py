import os
import signal
import threading
from types import SimpleNamespace

import pytest

from vamo_ft.training import signals
from vamo_ft.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_the_flag_and_a_second_changes_nothing(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as stop:
        assert not stop.requested()
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.name == number.name
        for other in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), other)
        assert stop.name == number.name
    assert {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)} == before
    assert stop.requested(), "still known after the handlers are gone"


def test_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_does_nothing_outside_of_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with StopSignals() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_a_time_limit_asks_for_a_stop_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    with StopSignals(max_seconds=2.5) as stop:
        clock.seconds = 102.4
        assert (stop.requested(), stop.cause) == (False, None)
        clock.seconds = 102.5
        assert (stop.requested(), stop.cause, stop.name) == (True, "time limit", None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.cause == "time limit", "what came first"
    with StopSignals(max_seconds=1) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        clock.seconds = 1000
        assert (stop.requested(), stop.cause) == (True, "SIGTERM")


def test_the_last_work_of_a_process_ignores_signals_after_the_first() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        with StopSignals(last=True):
            pass
        assert {n: signal.getsignal(n) for n in before} == before
        with StopSignals(last=True):
            os.kill(os.getpid(), signal.SIGTERM)
        assert {signal.getsignal(n) for n in before} == {signal.SIG_IGN}
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
