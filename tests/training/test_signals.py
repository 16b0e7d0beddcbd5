import os
import signal
import threading

import pytest

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
