import pytest
import torch
from torch import Tensor, nn

from tests.tiny import tiny_gpt2, tiny_llama
from tests.toys import NetworkObjective, TinyNetwork, ToySource, exact_gradient, normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Objective
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Batch, LossTerms, Work
from vamo_ft.estimators.forward_gradient import ForwardGradient
from vamo_ft.objectives.causal_lm import CausalLM

SOURCE = ToySource(normal(8, 10, seed=0), batch_size=8, counts=torch.arange(8) % 3 + 1.0, lengths=[2] * 8)


def network() -> NetworkObjective:
    return NetworkObjective(TinyNetwork(10, dtype=torch.float64, dropout=0.5))


def forward_gradient(
    objective: Objective, *, num_probes: int = 1, distribution="rademacher"
) -> tuple[ForwardGradient, HashedDirections]:
    parameters = TrainableParameters(objective.module)
    directions = HashedDirections(parameters, distribution=distribution)
    estimator = ForwardGradient(objective, parameters, directions, LocalRuntime(), num_probes=num_probes, seed=0)
    return estimator, directions


def rows(directions: HashedDirections, keys: tuple[HashKey, ...]) -> Tensor:
    return torch.stack([directions.values(key, 0, directions.numel) for key in keys]).double()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("parts", [1, 4])
def test_coefficients_are_the_directional_derivatives(distribution, parts):
    objective = network()
    estimator, directions = forward_gradient(objective, num_probes=3, distribution=distribution)
    size, seen = 8 // parts, list[int]()
    objective.module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    estimate = estimator.estimate([SOURCE.batch(range(start, start + size)) for start in range(0, 8, size)], 4)
    assert sum(seen) == 3 * 8  # each counted twice below
    projected = estimate.projected
    assert projected is not None
    assert projected.keys == tuple(HashKey(0, Domain.DIRECTION, 4, probe) for probe in range(3))
    exact = exact_gradient(objective, SOURCE.batch(range(8)))
    expected = rows(directions, projected.keys) @ exact
    # normal directions are hashed in float32
    tolerance = 1e-13 if distribution == "rademacher" else 1e-6
    assert (3 * projected.coefficients - expected).norm() < tolerance * exact.norm() * directions.numel**0.5
    assert float(estimate.loss) == pytest.approx(float(_mean(objective).detach()), rel=1e-12)
    assert estimate.work == Work(forward_samples=6 * 8, forward_tokens=6 * 16)


def language_batch() -> Batch:
    ids = torch.arange(24).view(2, 12) * 7 % 250 + 5
    positions = torch.tensor([6, 9, 10])
    return Batch(
        indices=(0, 1),
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        targets={"positions": positions, "tokens": torch.tensor([[9, 8, -100], [7, 6, 5]])},
        counts=torch.tensor([2.0, 3.0]),
        num_tokens=24,
    )


@pytest.mark.parametrize("model", ["llama", "llama_tied", "gpt2_tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_of_a_language_model(model, dtype):
    module = (tiny_gpt2() if model == "gpt2_tied" else tiny_llama(tied=model == "llama_tied")).to(dtype)
    module.set_attn_implementation("eager")
    module.config.use_cache = False
    objective = CausalLM(module, accepts_logits_to_keep=True)
    estimator, directions = forward_gradient(objective, num_probes=2)
    digest = TrainableParameters(module).digest()
    projected = estimator.estimate([language_batch()], 1).projected
    assert projected is not None
    exact = exact_gradient(objective, language_batch()).double()
    expected = rows(directions, projected.keys) @ exact
    # llama's norms and rotations are float32 whatever the weights are
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13 if model == "gpt2_tied" else 2e-9
    assert (2 * projected.coefficients - expected).norm() < tolerance * exact.norm() * directions.numel**0.5
    assert expected.abs().min() > 1e-3 * exact.norm()
    assert TrainableParameters(module).digest() == digest
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_the_mean_over_steps_is_the_gradient():
    objective = network()
    batch = SOURCE.batch(range(8))
    exact = exact_gradient(objective, batch)
    estimator, directions = forward_gradient(objective, num_probes=4, distribution="gaussian")
    steps, mean = 150, torch.zeros_like(exact)
    for step in range(steps):
        projected = estimator.estimate([batch], step).projected
        assert projected is not None
        mean += projected.coefficients @ rows(directions, projected.keys) / steps
    expected_error = exact.norm() * (directions.numel / (4 * steps)) ** 0.5
    assert 0.4 * expected_error < (mean - exact).norm() < 1.6 * expected_error


def test_an_operation_without_a_forward_derivative_is_named():
    module = tiny_llama()
    module.set_attn_implementation("sdpa")
    objective = CausalLM(module, accepts_logits_to_keep=True)
    digest = TrainableParameters(module).digest()
    estimator, _ = forward_gradient(objective)
    with pytest.raises(UsageError, match=r"forward AD with _scaled_dot_product.*Write model\.attn_implem") as caught:
        estimator.estimate([language_batch()], 0)
    assert "\n" not in str(caught.value)
    assert TrainableParameters(module).digest() == digest
    module.set_attn_implementation("eager")
    assert estimator.estimate([language_batch()], 0).loss.isfinite()


def test_frozen_and_unused_parameters():
    class Model(TinyNetwork):
        def __init__(self) -> None:
            super().__init__(10, dtype=torch.float64)
            self.layer.weight.requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))

    objective = NetworkObjective(Model())
    estimator, directions = forward_gradient(objective)
    projected = estimator.estimate([SOURCE.batch(range(8))], 0).projected
    assert projected is not None
    exact = torch.autograd.grad(_mean(objective), objective.network.layer.bias)[0]
    [z] = rows(directions, projected.keys)
    assert float(projected.coefficients[0]) == pytest.approx(float(z[:3] @ exact), rel=1e-12)


def _mean(objective: NetworkObjective) -> Tensor:
    terms: LossTerms = objective.terms(SOURCE.batch(range(8)))
    return terms.total.sum() / terms.count.sum()
