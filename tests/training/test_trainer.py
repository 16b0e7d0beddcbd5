import math

import pytest
import torch

from tests.toys import SilentProgress, ToySource, normal
from vamo_ft.core.errors import DivergenceError, StopRequested
from vamo_ft.core.types import Estimate, Work
from vamo_ft.training.callbacks import Callback
from vamo_ft.training.state import RunState
from vamo_ft.training.trainer import Trainer


class Scripted:
    """An estimator and an update rule that note what they are asked."""

    def __init__(self, losses) -> None:
        self.losses = losses
        self.calls: list[tuple] = []

    def prepare(self, source, step: int) -> Work:
        self.calls.append(("prepare", step))
        return Work(forward_samples=100)

    def estimate(self, micro_batches, step: int) -> Estimate:
        self.calls.append(("estimate", step, [len(batch) for batch in micro_batches]))
        return Estimate(loss=torch.tensor(self.losses[step]), work=Work(1, 2, 3, 4))

    def apply(self, estimate, *, learning_rate: float, step: int):
        self.calls.append(("apply", step, learning_rate))
        return {}


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def at_boundary(self, state) -> None:
        self.events.append(("boundary", state.step))

    def after_step(self, state, record) -> None:
        self.events.append(("step", state.step, record.loss))

    def on_stop(self, state) -> None:
        self.events.append(("stop", state.step))


def trainer(scripted: Scripted, recorder: Recorder, *, num_steps: int, stop_requested=lambda: False) -> Trainer:
    return Trainer(
        source=ToySource(normal(10, 2, seed=0), batch_size=5),
        estimator=scripted,
        update_rule=scripted,
        learning_rate=lambda step: 0.1 * (step + 1),
        num_steps=num_steps,
        micro_batch_size=2,
        callbacks=[recorder],
        progress=SilentProgress(),
        stop_requested=stop_requested,
        state=RunState(),
    )


def test_the_order_of_events_and_the_counts():
    scripted, recorder = Scripted([1.0, 2.0]), Recorder()
    loop = trainer(scripted, recorder, num_steps=2)
    loop.train()
    assert scripted.calls == [
        ("prepare", 0),
        ("estimate", 0, [2, 2, 1]),
        ("apply", 0, 0.1),
        ("prepare", 1),
        ("estimate", 1, [2, 2, 1]),
        ("apply", 1, 0.2),
    ]
    assert recorder.events == [("boundary", 0), ("step", 1, 1.0), ("boundary", 1), ("step", 2, 2.0), ("boundary", 2)]
    assert (loop.state.samples, loop.state.tokens) == (10, 10)
    assert loop.state.work == Work(202, 4, 6, 8)
    assert RunState.from_state_dict(loop.state.state_dict()) == loop.state


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(loss):
    scripted = Scripted([1.0, loss])
    loop = trainer(scripted, Recorder(), num_steps=5)
    with pytest.raises(DivergenceError, match="step 2: the loss is"):
        loop.train()
    assert [call[1] for call in scripted.calls if call[0] == "apply"] == [0]
    assert loop.state.step == 1


def test_a_stop_is_honoured_at_the_boundary_and_told_to_the_callbacks():
    scripted, recorder = Scripted([1.0] * 5), Recorder()
    loop = trainer(scripted, recorder, num_steps=5, stop_requested=lambda: loop.state.step == 2)
    with pytest.raises(StopRequested, match="after step 2"):
        loop.train()
    assert recorder.events[-2:] == [("boundary", 2), ("stop", 2)]
