"""Float32 values of bfloat16 weights that are kept between the steps, against torch.optim on float32 copies."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import TinyNetwork, normal
from vamo_ft.core.blocks import Block, BlockDirections
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions
from vamo_ft.core.types import Estimate, ProjectedGradient, Work
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.update_rules import DenseRule, build_optimizer

NOTHING = Estimate(loss=torch.zeros(()), work=Work())
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


def low(width: int = 10, *, value: float | None = None) -> TrainableParameters:
    network = TinyNetwork(width, dtype=torch.bfloat16)
    if value is not None:
        with torch.no_grad():
            network.layer.weight.fill_(value)
    return TrainableParameters(network)


def dense(parameters: TrainableParameters, name: str, *, weight_decay: float = 0.0, masters: bool = True) -> DenseRule:
    carriers = Carriers(parameters, seed=7, master_weights=masters)
    optimizer = build_optimizer(
        carriers, name="sgd" if name == "momentum" else name, weight_decay=weight_decay, **RULES[name][1]
    )
    return DenseRule(carriers, None, optimizer, max_grad_norm=None)


def projected(step: int, *coefficients: float) -> Estimate:
    keys = tuple(HashKey(1, Domain.DIRECTION, step, probe) for probe in range(len(coefficients)))
    return Estimate(torch.zeros(()), Work(), ProjectedGradient(torch.tensor(coefficients, dtype=torch.float64), keys))


def masters_of(rule: DenseRule | ProjectedSgd, parameters: TrainableParameters) -> list[Tensor]:
    return [rule.state_dict()[name]["master"] for name in parameters.names]


@pytest.mark.parametrize("resumed_at", [None, 4])
@pytest.mark.parametrize("name", RULES)
def test_masters_are_torch_optims_float32_weights_bit_for_bit(name: str, resumed_at: int | None) -> None:
    parameters = low()
    wide = [torch.nn.Parameter(tensor.detach().float()) for tensor in parameters.tensors]
    bias, weight = wide
    kind, keywords = RULES[name]
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    reference = kind(groups, lr=1e-3, **keywords)
    rule = dense(parameters, name, weight_decay=0.1)
    for step in range(8):
        if step == resumed_at:
            state = {
                name: {key: value.clone() for key, value in each.items()} for name, each in rule.state_dict().items()
            }
            parameters = restored(parameters)
            rule = dense(parameters, name, weight_decay=0.1)
            rule.load_state_dict(state)
        for number, (tensor, copy) in enumerate(zip(parameters.tensors, wide, strict=True)):
            tensor.grad = normal(*tensor.shape, seed=10 * step + number).to(torch.bfloat16)
            copy.grad = tensor.grad.float()
        reference.step()
        rule.apply(NOTHING, learning_rate=1e-3, step=step)
        masters = masters_of(rule, parameters)
        assert all(torch.equal(master, copy) for master, copy in zip(masters, wide, strict=True))
        for tensor, copy in zip(parameters.tensors, wide, strict=True):
            assert torch.equal(tensor, copy.to(torch.bfloat16))
    assert any(bool((copy != copy.to(torch.bfloat16).float()).any()) for copy in wide), (
        "they hold more than the weights"
    )


def restored(parameters: TrainableParameters) -> TrainableParameters:
    """Of a model that was loaded again, as a checkpoint has it: in bfloat16."""
    again = low()
    again.assign([tensor.detach().clone() for tensor in parameters.tensors])
    return again


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_updates_far_below_an_ulp_add_up(name: str, masters: bool) -> None:
    """300 updates of 2e-5 on a weight of 1, below which an ulp is 2**-8: each is kept, or all in the mean."""
    parameters = low(2000, value=1.0)
    rule = dense(parameters, name, masters=masters)
    weight = parameters.tensors[1]
    for step in range(300):
        weight.grad = torch.ones_like(weight)
        rule.apply(NOTHING, learning_rate=2e-5, step=step)
    moved = 1 - weight.detach().float()
    if masters:
        assert (1 - masters_of(rule, parameters)[1]).mean() == pytest.approx(6e-3, rel=2e-3)
        assert bool((moved == 2**-7).all()), "the value next to 1 - 6e-3"
    else:
        assert moved.mean() == pytest.approx(6e-3, rel=0.1)


def test_no_gradient_no_step_and_float32_parameters_have_no_masters() -> None:
    network = TinyNetwork(10, dtype=torch.bfloat16)
    network.layer.bias = torch.nn.Parameter(network.layer.bias.detach().float())
    parameters = TrainableParameters(network)
    rule = dense(parameters, "sgd")
    assert set(rule.state_dict()) == {"layer.weight"}
    bias, weight = parameters.copy()
    network.layer.bias.grad = torch.ones_like(network.layer.bias)
    rule.apply(NOTHING, learning_rate=0.5, step=0)
    assert torch.equal(network.layer.bias, bias - 0.5)
    assert torch.equal(network.layer.weight, weight)


def plain_sgd(parameters: TrainableParameters, directions: Directions, *, masters: bool = True) -> ProjectedSgd:
    return ProjectedSgd(parameters, directions, weight_decay=0.2, max_grad_norm=None, seed=3, master_weights=masters)


@pytest.mark.parametrize("resumed_at", [None, 3])
def test_projected_updates_go_to_the_masters(resumed_at: int | None) -> None:
    """As on float32 parameters of the same values, bit for bit; the weights are their nearest rounding."""
    parameters, exact = low(), TrainableParameters(TinyNetwork(10))
    exact.assign([tensor.detach().float() for tensor in parameters.tensors])
    reference = plain_sgd(exact, HashedDirections(exact, distribution="gaussian"), masters=False)
    rule = plain_sgd(parameters, HashedDirections(parameters, distribution="gaussian"))
    updates = []
    for step in range(6):
        if step == resumed_at:
            state = {name: {"master": each["master"].clone()} for name, each in rule.state_dict().items()}
            parameters = restored(parameters)
            rule = plain_sgd(parameters, HashedDirections(parameters, distribution="gaussian"))
            rule.load_state_dict(state)
        for each in (reference, rule):
            each.apply(projected(step, 0.3, -0.4), learning_rate=1e-3, step=step)
        updates.append(rule.applied)
        assert all(torch.equal(a, b) for a, b in zip(masters_of(rule, parameters), exact.tensors, strict=True))
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(parameters.tensors, exact.tensors, strict=True))
    again = low()
    second = plain_sgd(again, HashedDirections(again, distribution="gaussian"))
    for update in updates:
        assert update is not None
        second.replay(update)
    assert again.digest() == parameters.digest(), "a replay begins at the same masters"


def test_only_the_block_of_a_step_is_rounded_anew() -> None:
    parameters = low()
    blocks = (Block("bias", (0,)), Block("weight", (1,)))
    rule = plain_sgd(parameters, BlockDirections(HashedDirections(parameters), blocks, order="cyclic"))
    with torch.no_grad():
        parameters.tensors[1].fill_(5.0)  # not what its master says
    rule.apply(projected(0, 0.3), learning_rate=0.1, step=0)
    assert bool((parameters.tensors[1] == 5.0).all())


def test_masters_of_another_run_are_left_out() -> None:
    """A state without them, and one that has them where none are kept."""
    parameters = low()
    rule = dense(parameters, "momentum")
    parameters.tensors[1].grad = torch.ones_like(parameters.tensors[1])
    rule.apply(NOTHING, learning_rate=1e-3, step=0)
    state, again = rule.state_dict(), restored(parameters)
    for masters, given in ((False, state), (True, {name: {} for name in parameters.names})):
        other = dense(again, "momentum", masters=masters)
        other.load_state_dict(given)
        assert all(torch.equal(a, b) for a, b in zip(again.tensors, parameters.tensors, strict=True))
        if masters:
            assert all(torch.equal(a, b.float()) for a, b in zip(masters_of(other, again), again.tensors, strict=True))
        else:
            assert {key for each in other.state_dict().values() for key in each} == {"momentum_buffer"}
