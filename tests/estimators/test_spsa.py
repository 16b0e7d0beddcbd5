import pytest
import torch

from tests.toys import NetworkObjective, TinyNetwork, ToySource, exact_gradient, normal
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import VamoFtError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.optim.projected import ProjectedSgd

SOURCE = ToySource(normal(8, 10, seed=0), batch_size=8, counts=torch.arange(8) % 3 + 1.0)


def network() -> NetworkObjective:
    return NetworkObjective(TinyNetwork(10, dtype=torch.float64))


def spsa(objective: NetworkObjective, *, distribution="rademacher", **settings) -> tuple[Spsa, HashedDirections]:
    parameters = TrainableParameters(objective.module)
    directions = HashedDirections(parameters, distribution=distribution)
    runtime = LocalRuntime()
    settings = {"num_probes": 1, "eps": 1e-3, "difference": "central", "seed": 0, **settings}
    return Spsa(LossProbe(objective, parameters, directions, runtime), runtime, **settings), directions


@pytest.mark.parametrize(("difference", "order"), [("central", 2), ("forward", 1)])
def test_coefficients_approach_the_directional_derivative_at_their_order(difference, order):
    objective = network()
    batch = SOURCE.batch(range(8))
    errors = []
    for eps in (2e-2, 1e-2):
        estimator, directions = spsa(objective, num_probes=3, eps=eps, difference=difference)
        projected = estimator.estimate([batch], 4).projected
        assert projected is not None
        keys = [HashKey(0, Domain.DIRECTION, 4, probe) for probe in range(3)]
        assert projected.keys == tuple(keys)
        rows = torch.stack([directions.values(key, 0, directions.numel) for key in keys]).double()
        errors.append((3 * projected.coefficients - rows @ exact_gradient(objective, batch)).norm())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    assert errors[1] < (0.05 if difference == "central" else 0.5)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_the_mean_over_steps_is_the_gradient(distribution):
    objective = network()
    batch = SOURCE.batch(range(8))
    exact = exact_gradient(objective, batch)
    estimator, directions = spsa(objective, distribution=distribution, num_probes=4)
    steps = 300
    mean = torch.zeros_like(exact)
    for step in range(steps):
        projected = estimator.estimate([batch], step).projected
        assert projected is not None
        rows = torch.stack([directions.values(key, 0, directions.numel) for key in projected.keys]).double()
        mean += projected.coefficients @ rows / steps
    expected_error = exact.norm() * (directions.numel / (4 * steps)) ** 0.5  # of independent directions
    assert (mean - exact).norm() < 1.6 * expected_error
    assert (mean - exact).norm() > 0.4 * expected_error


def test_losses_that_ignore_the_perturbation_are_an_error():
    estimator, _ = spsa(network(), eps=1e-30)
    with pytest.raises(VamoFtError, match=r"^step 1: .*the perturbation does not reach the model"):
        estimator.estimate([SOURCE.batch(range(8))], 0)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_piecewise_constant_loss_may_ignore_it_and_then_nothing_moves(difference, max_grad_norm):
    objective = network()
    estimator, directions = spsa(objective, num_probes=3, eps=1e-30, difference=difference, piecewise_constant=True)
    estimate = estimator.estimate([SOURCE.batch(range(8))], 0)
    assert estimate.projected is not None
    assert estimate.projected.coefficients.tolist() == [0, 0, 0]
    parameters = TrainableParameters(objective.module)
    before = parameters.copy()
    rule = ProjectedSgd(parameters, directions, weight_decay=0.0, max_grad_norm=max_grad_norm, seed=0)
    rule.apply(estimate, learning_rate=1.0, step=0)
    assert all(torch.equal(*pair) for pair in zip(parameters.tensors, before, strict=True))
