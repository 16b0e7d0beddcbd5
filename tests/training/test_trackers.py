import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

import pytest

from vamo_ft.core.errors import StopRequested
from vamo_ft.training import trackers as module
from vamo_ft.training.trackers import Trackers


class Recorder:
    """Remembers what it was told; fails or blocks where it is told to."""

    name = "recorder"

    def __init__(self, *, shown: int | None = None) -> None:
        self.shown = shown
        self.told: list[object] = []
        self.failing: set[int] = set()
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()

    def go_on(self, step: int | None) -> int | None:
        if self.broken:
            raise ConnectionError("no\nnetwork")
        self.told.append(("go on", step))
        return self.shown

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.gate.wait()
        if step in self.failing:
            raise TimeoutError(f"step {step}")
        self.told.append((step, dict(values)))

    def finish(self, *, exit_code: int) -> None:
        self.told.append(("finish", exit_code))


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vamo_ft")


def test_figures_arrive_in_order_and_events_and_gaps_do_not() -> None:
    recorder = Recorder()
    with Trackers([recorder]) as trackers:
        trackers.go_on(None)
        trackers.write({"step": 1, "loss": 2, "grad_norm": None, "note": "x", "method.alpha": float("nan")})
        trackers.write({"step": 1, "event": "rollback", "rollbacks": 1})
        trackers.write({"step": 2, "eval.loss": 0.5})
    assert recorder.told == [("go on", None), (1, {"loss": 2.0}), (2, {"eval.loss": 0.5}), ("finish", 0)]


def test_what_is_shown_already_is_not_logged_again() -> None:
    recorder = Recorder(shown=4)
    with Trackers([recorder]) as trackers:
        trackers.go_on(2)
        for step in (3, 4, 5):
            trackers.write({"step": step, "loss": 1.0})
    assert recorder.told == [("go on", 2), (5, {"loss": 1.0}), ("finish", 0)]


def test_a_tracker_that_fails_is_told_of_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    recorder, other = Recorder(), Recorder()
    recorder.failing = {2, 3}
    with Trackers([recorder, other]) as trackers:
        trackers.go_on(None)
        for step in range(1, 5):
            trackers.write({"step": step, "loss": 1.0})
    assert [told[0] for told in recorder.told[1:-1]] == [1, 4]
    assert [told[0] for told in other.told[1:-1]] == [1, 2, 3, 4]
    assert caplog.messages == [
        "logging.trackers: recorder fails (TimeoutError: step 2); the run goes on, and metrics.jsonl has everything"
    ]


def test_a_tracker_that_cannot_be_opened_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    recorder.broken = True
    with Trackers([recorder]) as trackers:
        trackers.go_on(None)
        trackers.write({"step": 1, "loss": 1.0})
    assert recorder.told == []
    assert "recorder fails (ConnectionError: no network)" in caplog.text
    assert len(caplog.messages) == 1


def test_a_tracker_that_hangs_holds_up_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAITING", 3)
    monkeypatch.setattr(module, "_SECONDS_AT_STOP", 0.05)
    recorder = Recorder()
    recorder.gate.clear()
    began = time.monotonic()
    with suppress(StopRequested), Trackers([recorder]) as trackers:
        trackers.go_on(None)
        for step in range(1, 100):
            trackers.write({"step": step, "loss": 1.0})
        raise StopRequested("stopped")
    assert time.monotonic() - began < 20
    recorder.gate.set()
    assert caplog.messages == [
        "logging.trackers: recorder fails (it cannot keep up); the run goes on, and metrics.jsonl has everything",
        "logging.trackers: recorder is not done after 0 s; what it has not sent is lost to it, and is in metrics.jsonl",
    ]


@pytest.mark.parametrize(("error", "code"), [(StopRequested("stopped"), 75), (KeyError("x"), 1)])
def test_the_end_is_told_with_its_exit_code(error: Exception, code: int) -> None:
    recorder = Recorder()
    with suppress(type(error)), Trackers([recorder]) as trackers:
        trackers.go_on(None)
        raise error
    assert recorder.told[-1] == ("finish", code)


def test_nothing_is_opened_for_a_run_that_does_not_begin() -> None:
    recorder = Recorder()
    with Trackers([recorder]):
        pass
    assert recorder.told == []
