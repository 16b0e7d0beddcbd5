import math

import pytest
import torch

from tests.toys import SilentProgress, TinyNetwork, ToySource, normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import DivergenceError, StopRequested
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import UpdateRule
from vamo_ft.core.types import Estimate, ProjectedGradient, Work
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.update_rules import DenseRule, build_optimizer
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


def build_rule(kind: str, parameters: TrainableParameters) -> UpdateRule:
    if kind == "projected":
        return ProjectedSgd(parameters, HashedDirections(parameters), weight_decay=0.1, max_grad_norm=1.0, seed=1)
    carriers = Carriers(parameters, seed=1)
    rule = build_optimizer(carriers, name="sgd" if kind == "sgd" else "adamw", weight_decay=0.1)
    return DenseRule(carriers, HashedDirections(parameters), rule, max_grad_norm=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "projected"), [("projected", True), ("sgd", True), ("sgd", False), ("adamw", True), ("adamw", False)]
)
def test_an_estimate_that_is_not_finite_leaves_the_parameters_as_they_are(kind, projected, bad, dtype):
    network = TinyNetwork(4, dtype=dtype)
    parameters = TrainableParameters(network)

    class OneIsBad(Scripted):
        def estimate(self, micro_batches, step: int) -> Estimate:
            value = bad if step == 1 else 0.5
            if projected:
                keys = (HashKey(7, Domain.DIRECTION, step, 0), HashKey(7, Domain.DIRECTION, step, 1))
                coefficients = torch.tensor([0.5, value], dtype=torch.float64)
                return Estimate(loss=torch.tensor(1.0), work=Work(), projected=ProjectedGradient(coefficients, keys))
            for gradient in parameters.gradients():
                gradient.fill_(0.5)
            parameters.gradients()[0].view(-1)[0] = value
            return Estimate(loss=torch.tensor(1.0), work=Work())

    loop = trainer(OneIsBad([]), Recorder(), num_steps=1)
    loop.update_rule = build_rule(kind, parameters)
    before = parameters.digest()
    loop.train()
    after = parameters.digest()
    assert after != before
    loop.num_steps = 2
    with pytest.raises(DivergenceError, match=r"^step 2: .*; the update was not made$") as caught:
        loop.train()
    assert parameters.digest() == after
    assert (caught.value.step, caught.value.samples) == (1, (5, 6, 7, 8, 9))
    assert loop.state.step == 1


def test_the_finite_checks_of_loss_and_coefficients_wait_for_the_device_once(monkeypatch):
    """`tolist`, `item`, `float` and `bool` of a tensor are what waits."""
    waits: list[str] = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, name=name, original=original: (waits.append(name), original(self))[1]
        )
    keys = (HashKey(7, Domain.DIRECTION, 0, 0),)
    projected = ProjectedGradient(torch.ones(1, dtype=torch.float64), keys)
    scripted = Scripted([])
    monkeypatch.setattr(scripted, "estimate", lambda batches, step: Estimate(torch.tensor(1.0), Work(), projected))
    loop = trainer(scripted, Recorder(), num_steps=1)
    loop.train()
    assert waits == ["tolist"]


def test_a_step_that_is_skipped_is_prepared_and_makes_no_update():
    scripted, recorder = Scripted([1.0, 2.0, 3.0]), Recorder()
    loop = trainer(scripted, recorder, num_steps=3)
    loop.state.skipped = [1]
    loop.state.learning_rate_scale = 0.5
    loop.train()
    assert [call[:2] for call in scripted.calls] == [
        ("prepare", 0),
        ("estimate", 0),
        ("apply", 0),
        ("prepare", 1),
        ("prepare", 2),
        ("estimate", 2),
        ("apply", 2),
    ]
    assert [call[2] for call in scripted.calls if call[0] == "apply"] == [0.05, pytest.approx(0.15)]
    assert [event[:2] for event in recorder.events if event[0] == "step"] == [("step", 1), ("step", 3)]
    assert (loop.state.step, loop.state.samples) == (3, 10)
    assert RunState.from_state_dict(loop.state.state_dict()) == loop.state
