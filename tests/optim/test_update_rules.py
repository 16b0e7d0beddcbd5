import math

import pytest
import torch

from tests.toys import NetworkObjective, TinyNetwork, ToySource, normal
from vamo_ft.core.blocks import Block, BlockDirections
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.factored import LowRankDirections
from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rounding import stochastically_rounded
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.sparse import SparseDirections
from vamo_ft.core.types import Estimate, ProjectedGradient, Work
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.optim import update_rules
from vamo_ft.optim.carriers import Carriers, update_rounding
from vamo_ft.optim.projected import ProjectedSgd
from vamo_ft.optim.update_rules import DenseRule, build_optimizer

RULES = {
    "sgd": ({"momentum": 0.9, "nesterov": True}, lambda p, wd: torch.optim.SGD(p, momentum=0.9, nesterov=True)),
    "adamw": ({"betas": (0.8, 0.95), "eps": 1e-6}, lambda p, wd: torch.optim.AdamW(p, betas=(0.8, 0.95), eps=1e-6)),
    "adagrad": ({}, lambda p, wd: torch.optim.Adagrad(p)),
}


def source() -> ToySource:
    return ToySource(normal(40, 10, seed=0, dtype=torch.float32), batch_size=8)


def reference_digest(name: str, *, steps: int, clip: float | None) -> str:
    """The same data through plain autograd and torch.optim."""
    objective = NetworkObjective(TinyNetwork(10))
    weight, bias = objective.network.layer.weight, objective.network.layer.bias
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = RULES[name][1](groups, 0.1)
    data = source()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        optimizer.zero_grad()
        terms = objective.terms(data.batch(data.step_indices(step)))
        (terms.total / terms.count.sum()).sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([bias, weight], clip)
        optimizer.step()
    return TrainableParameters(objective.module).digest()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("resumed_at", [None, 3])
def test_trajectories_equal_torch_optim_bit_for_bit(name, clip, resumed_at):
    objective = NetworkObjective(TinyNetwork(10))
    parameters = TrainableParameters(objective.module)
    estimator = FirstOrder(objective, parameters, LocalRuntime(), seed=0)

    def build() -> DenseRule:
        carriers = Carriers(parameters, seed=0)
        optimizer = build_optimizer(carriers, name=name, weight_decay=0.1, **RULES[name][0])
        return DenseRule(carriers, None, optimizer, max_grad_norm=clip)

    rule, data = build(), source()
    for step in range(6):
        if step == resumed_at:
            state = rule.state_dict()
            rule = build()
            rule.load_state_dict(state)
        estimate = estimator.estimate([data.batch(data.step_indices(step))], step)
        norm = rule.apply(estimate, learning_rate=0.05 / (step + 1), step=step)["grad_norm"]
        assert norm is not None and norm > 0.1
    assert parameters.digest() == reference_digest(name, steps=6, clip=clip)


@pytest.mark.parametrize("resumed_at", [None, 3])
def test_the_form_of_adamw_that_cuda_takes(resumed_at, monkeypatch):
    """One pass over memory; the CPU has it, too."""
    monkeypatch.setattr(update_rules, "_on_cuda", lambda carriers: True)
    settings = RULES["adamw"][0]
    monkeypatch.setitem(RULES, "adamw", (settings, lambda p, wd: torch.optim.AdamW(p, **settings, fused=True)))
    test_trajectories_equal_torch_optim_bit_for_bit("adamw", 0.1, resumed_at)


def projected(*coefficients: float) -> Estimate:
    keys = tuple(HashKey(1, Domain.DIRECTION, 0, probe) for probe in range(len(coefficients)))
    gradient = ProjectedGradient(torch.tensor(coefficients, dtype=torch.float64), keys)
    return Estimate(loss=torch.zeros(()), work=Work(), projected=gradient)


def dense(estimate: Estimate, directions: HashedDirections) -> torch.Tensor:
    rows = torch.stack([directions.values(key, 0, directions.numel) for key in estimate.projected.keys])
    return estimate.projected.coefficients @ rows.double()


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_projected_sgd_equals_dense_arithmetic_and_allocates_no_gradient(clip):
    network = TinyNetwork(10, dtype=torch.float64)
    parameters = TrainableParameters(network)
    directions = HashedDirections(parameters, distribution="gaussian")
    rule = ProjectedSgd(parameters, directions, weight_decay=0.2, max_grad_norm=clip, seed=0)
    estimate = projected(0.3, -0.4)
    gradient = dense(estimate, directions)
    norm = gradient.norm()
    if clip is not None:
        gradient = gradient * min(1.0, clip / float(norm))
    old = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    measured = rule.apply(estimate, learning_rate=0.1, step=0)
    split = dict(zip(parameters.names, gradient.split([t.numel() for t in parameters.tensors]), strict=True))
    weight = old["layer.weight"] * (1 - 0.1 * 0.2) - 0.1 * split["layer.weight"].view(3, 10)
    bias = old["layer.bias"] - 0.1 * split["layer.bias"]
    assert torch.allclose(network.layer.weight, weight, atol=1e-12)
    assert torch.allclose(network.layer.bias, bias, atol=1e-12)
    assert measured["grad_norm"] is None if clip is None else measured["grad_norm"] == pytest.approx(float(norm))
    assert all(tensor.grad is None for tensor in parameters.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_makes_the_updates_again_bit_for_bit(dtype):
    def build() -> tuple[TrainableParameters, ProjectedSgd]:
        parameters = TrainableParameters(TinyNetwork(10, dtype=dtype))
        directions = HashedDirections(parameters, distribution="sphere")
        return parameters, ProjectedSgd(parameters, directions, weight_decay=0.2, max_grad_norm=0.5, seed=3)

    parameters, rule = build()
    assert rule.applied is None
    updates, start = [], parameters.digest()
    for step in range(4):
        rule.apply(projected(0.3 * step, -1 / 3), learning_rate=0.1 / (step + 1), step=step)
        updates.append(rule.applied)
    assert [(update.step, update.learning_rate) for update in updates] == [(i, 0.1 / (i + 1)) for i in range(4)]
    assert all(update.gradient.keys == projected(0.0, 0.0).projected.keys for update in updates)
    assert dense(Estimate(torch.zeros(()), Work(), updates[1].gradient), rule._directions).norm() < 0.5 + 1e-6
    again, second = build()
    assert again.digest() == start
    for update in updates:
        second.replay(update)
    assert again.digest() == parameters.digest() != start


def test_bfloat16_updates_far_below_an_ulp_do_not_vanish():
    network = TinyNetwork(2000, dtype=torch.bfloat16)
    with torch.no_grad():
        network.layer.weight.fill_(1.0)
    parameters = TrainableParameters(network)
    directions = HashedDirections(parameters)
    rule = ProjectedSgd(parameters, directions, weight_decay=0.0, max_grad_norm=None, seed=0)
    for step in range(100):
        rule.apply(projected(1.0), learning_rate=2e-5, step=step)
    signs = torch.zeros_like(network.layer.weight, dtype=torch.float32)
    zeros = torch.zeros_like(network.layer.bias, dtype=torch.float32)
    directions.axpy_([zeros, signs], torch.tensor([1.0]), projected(1.0).projected.keys)
    moved = ((network.layer.weight.detach().float() - 1) * signs).mean()
    assert moved == pytest.approx(-100 * 2e-5, rel=0.2)


RULES_IN_FLOAT32 = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}, {}),
    "adagrad": (torch.optim.Adagrad, {}, {}),
}


@pytest.mark.parametrize("resumed_at", [None, 2])
@pytest.mark.parametrize("name", list(RULES_IN_FLOAT32))
def test_a_rule_steps_bfloat16_weights_in_float32_and_rounds_the_result(name, resumed_at):
    """Against torch.optim on a float32 copy of the weights, made anew in every step, with a state that lasts."""
    network = TinyNetwork(10, dtype=torch.bfloat16)
    parameters = TrainableParameters(network)
    kind, keywords, ours = RULES_IN_FLOAT32[name]
    wide = [torch.nn.Parameter(tensor.detach().float()) for tensor in parameters.tensors]
    bias, weight = wide
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    reference = kind(groups, lr=0.01, **keywords)

    def build() -> DenseRule:
        carriers = Carriers(parameters, seed=7)
        optimizer = build_optimizer(carriers, name=name, weight_decay=0.1, **ours)
        return DenseRule(carriers, None, optimizer, max_grad_norm=None)

    rule = build()
    for step in range(4):
        if step == resumed_at:
            state, rule = rule.state_dict(), build()
            rule.load_state_dict(state)
        for number, (tensor, copy) in enumerate(zip(parameters.tensors, wide, strict=True)):
            tensor.grad = normal(*tensor.shape, seed=10 * step + number).to(torch.bfloat16)
            copy.data, copy.grad = tensor.detach().float(), tensor.grad.float()
        reference.step()
        rule.apply(Estimate(loss=torch.zeros(()), work=Work()), learning_rate=0.01, step=step)
        flat = torch.cat([copy.detach().reshape(-1) for copy in wide])
        bits = random_bits(update_rounding(7, step), 0, len(flat), device=flat.device)
        rounded = stochastically_rounded(flat, bits, torch.bfloat16)
        assert torch.equal(torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors]), rounded)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "sign_sgd"])
def test_no_rule_loses_bfloat16_updates_far_below_an_ulp(name):
    """Every rule moves a weight of 1 against a lasting gradient of 1; an ulp there is 2**-7."""
    network = TinyNetwork(2000, dtype=torch.bfloat16)
    with torch.no_grad():
        network.layer.weight.fill_(1.0)
    parameters = TrainableParameters(network)
    carriers = Carriers(parameters, seed=0)
    rule = DenseRule(carriers, None, build_optimizer(carriers, name=name, weight_decay=0.0), max_grad_norm=None)
    for step in range(100):
        network.layer.weight.grad = torch.ones_like(network.layer.weight)
        rule.apply(Estimate(loss=torch.zeros(()), work=Work()), learning_rate=2e-5, step=step)
    steps = sum(1 / math.sqrt(step + 1) for step in range(100)) if name == "adagrad" else 100
    assert (network.layer.weight.detach().float() - 1).mean() == pytest.approx(-2e-5 * steps, rel=0.2)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_projected_gradient_goes_through_a_rule_with_state(name):
    network = TinyNetwork(10, dtype=torch.float64)
    parameters = TrainableParameters(network)
    directions = HashedDirections(parameters)
    carriers = Carriers(parameters, seed=0)
    optimizer = build_optimizer(carriers, name=name, weight_decay=0.0)
    rule = DenseRule(carriers, directions, optimizer, max_grad_norm=None)
    old = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])
    estimate = projected(0.3, -0.4)
    rule.apply(estimate, learning_rate=0.1, step=0)
    new = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])
    gradient = dense(estimate, directions)
    expected = old - 0.1 * (gradient if name == "sgd" else gradient / (gradient.abs() + 1e-8))
    assert torch.allclose(new, expected, atol=1e-9)


def test_sign_sgd_takes_steps_of_one_size_and_decays_apart_from_them():
    network = TinyNetwork(10, dtype=torch.float64)
    parameters = TrainableParameters(network)
    carriers = Carriers(parameters, seed=0)
    optimizer = build_optimizer(carriers, name="sign_sgd", weight_decay=0.1)
    rule = DenseRule(carriers, None, optimizer, max_grad_norm=None)
    (old_bias, old), gradient = parameters.copy(), normal(3, 10, seed=1)
    gradient[0] = 0.0
    network.layer.weight.grad = gradient.clone()
    rule.apply(Estimate(loss=torch.zeros(()), work=Work()), learning_rate=0.5, step=0)
    expected = (1 - 0.5 * 0.1) * old - 0.5 * gradient.sign()
    assert torch.allclose(network.layer.weight, expected, rtol=1e-12)
    assert torch.equal(network.layer.bias, old_bias), "no gradient, no step"
    assert rule.state_dict() == {}


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "sign_sgd"])
def test_a_rule_with_state_passes_over_what_the_directions_do_not_reach(name):
    """The second block gets neither decay nor state in the first block's step."""
    network = TinyNetwork(10, dtype=torch.float64)
    parameters = TrainableParameters(network)
    assert parameters.names == ("layer.bias", "layer.weight")
    blocks = (Block("bias", (0,)), Block("weight", (1,)))
    directions = BlockDirections(HashedDirections(parameters), blocks, order="cyclic")
    carriers = Carriers(parameters, seed=0)
    optimizer = build_optimizer(carriers, name=name, weight_decay=0.1)
    rule, (old_bias, old_weight) = DenseRule(carriers, directions, optimizer, max_grad_norm=1e9), parameters.copy()
    rule.apply(projected(0.3), learning_rate=0.1, step=0)
    assert torch.equal(network.layer.weight, old_weight)
    assert not torch.equal(network.layer.bias, old_bias)
    stateful = {"adamw": {"layer.bias"}, "adagrad": {"layer.bias", "layer.weight"}}  # adagrad sets sums up beforehand
    assert set(rule.state_dict()) == stateful.get(name, set())


@pytest.mark.parametrize("structure", ["full", "sparse", "low_rank"])
def test_both_rules_of_sgd_make_the_same_step(structure):
    """Directions made anew in the update equal those materialised in the gradient."""
    moved = []
    for dense_rule in (False, True):
        network = TinyNetwork(10, dtype=torch.float64)
        parameters = TrainableParameters(network)
        directions = {
            "full": lambda p: HashedDirections(p, distribution="gaussian"),
            "sparse": lambda p: SparseDirections(p, quantile=0.5),
            "low_rank": lambda p: LowRankDirections(p, rank=2, refresh_every=1),
        }[structure](parameters)
        if dense_rule:
            carriers = Carriers(parameters, seed=0)
            optimizer = build_optimizer(carriers, name="sgd", weight_decay=0.1)
            rule = DenseRule(carriers, directions, optimizer, max_grad_norm=0.3)
        else:
            rule = ProjectedSgd(parameters, directions, weight_decay=0.1, max_grad_norm=0.3, seed=0)
        norm = rule.apply(projected(0.3, -0.4), learning_rate=0.1, step=0)["grad_norm"]
        moved.append((float(norm), torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])))
    assert moved[0][0] == pytest.approx(moved[1][0], rel=1e-6)
    assert torch.allclose(moved[0][1], moved[1][1], atol=1e-9)
