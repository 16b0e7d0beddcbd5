import pytest
import torch
from torch import Tensor

from tests.toys import NetworkObjective, TinyNetwork, ToySource, exact_gradient, gradient, normal
from vamo_ft.core.blocks import Block, BlockDirections
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Work
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.mixed import Addax
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa

LENGTHS = [3, 9, 5, 6, 2, 7, 5, 1]
LONG, SHORT = [1, 3, 5], [0, 2, 4, 6, 7]  # at a boundary of 5
COUNTS = torch.arange(8) % 3 + 1.0


def toy_source(lengths: list[int] = LENGTHS) -> ToySource:
    return ToySource(normal(8, 10, seed=0), batch_size=8, counts=COUNTS, lengths=lengths)


def network() -> NetworkObjective:
    return NetworkObjective(TinyNetwork(10, dtype=torch.float64))


def addax(
    objective: NetworkObjective, *, num_probes: int = 1, directions: Directions | None = None
) -> tuple[Addax, Directions]:
    parameters, runtime = TrainableParameters(objective.module), LocalRuntime()
    directions = HashedDirections(parameters) if directions is None else directions
    probe = LossProbe(objective, parameters, directions, runtime)
    spsa = Spsa(probe, runtime, num_probes=num_probes, eps=1e-5, difference="central", seed=0)
    first_order = FirstOrder(objective, parameters, runtime, seed=0)
    return Addax(first_order, spsa, parameters, directions, runtime, boundary=5, weight=0.3), directions


def rows(directions: Directions, *, step: int, num_probes: int) -> Tensor:
    assert isinstance(directions, HashedDirections)
    keys = [HashKey(0, Domain.DIRECTION, step, probe) for probe in range(num_probes)]
    return torch.stack([directions.values(key, 0, directions.numel) for key in keys]).double()


def mean_loss(objective: NetworkObjective, source: ToySource, indices: list[int]) -> float:
    with torch.no_grad():
        terms = objective.terms(source.batch(indices))
    return float(terms.total.sum() / terms.count.sum())


@pytest.mark.parametrize("num_probes", [1, 3])
def test_long_samples_are_estimated_and_short_ones_differentiated(num_probes):
    objective, source = network(), toy_source()
    estimator, directions = addax(objective, num_probes=num_probes)
    estimator.prepare(source, 4)
    estimate = estimator.estimate([source.batch(range(8))], 4)
    assert estimate.projected is None
    z = rows(directions, step=4, num_probes=num_probes)
    actual = gradient(objective).clone()
    long, short = (exact_gradient(objective, source.batch(part)) for part in (LONG, SHORT))
    expected = 0.3 * (z @ long) @ z / num_probes + 0.7 * short
    assert (actual - expected).norm() < 1e-6 * expected.norm()
    assert float(estimate.loss) == pytest.approx(mean_loss(objective, source, list(range(8))), rel=1e-6)
    assert estimate.metrics["long_share"] == 3 / 8
    long_tokens, short_tokens = 9 + 6 + 7, 3 + 5 + 2 + 5 + 1
    passes = 2 * num_probes
    assert estimate.work == Work(passes * 3 + 5, 5, passes * long_tokens + short_tokens, short_tokens)


@pytest.mark.parametrize("kind", ["long", "short"])
def test_what_a_step_has_none_of_is_left_out_and_the_rest_keeps_its_weight(kind):
    objective = network()
    source = toy_source([6 if kind == "long" else 5] * 8)
    estimator, directions = addax(objective)
    estimator.prepare(source, 0)
    estimate = estimator.estimate([source.batch(range(8))], 0)
    actual, exact = gradient(objective).clone(), exact_gradient(objective, source.batch(range(8)))
    [z] = rows(directions, step=0, num_probes=1)
    expected = 0.3 * (z @ exact) * z if kind == "long" else 0.7 * exact
    assert (actual - expected).norm() < 1e-6 * expected.norm()
    assert estimate.work.backward_samples == (0 if kind == "long" else 8)
    assert float(estimate.loss) == pytest.approx(mean_loss(objective, source, list(range(8))), rel=1e-6)


def test_the_mean_over_directions_weighs_the_two_gradients():
    objective, source = network(), toy_source()
    estimator, directions = addax(objective, num_probes=4)
    estimator.prepare(source, 0)
    steps, mean = 100, torch.zeros(directions.numel, dtype=torch.float64)
    for step in range(steps):
        estimator.estimate([source.batch(range(8))], step)
        mean += gradient(objective) / steps
    long, short = (exact_gradient(objective, source.batch(part)) for part in (LONG, SHORT))
    spread = 0.3 * long.norm() * (directions.numel / (4 * steps)) ** 0.5
    error = (mean - 0.3 * long - 0.7 * short).norm()
    assert 0.4 * spread < error < 1.6 * spread


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_long_and_short_samples_never_share_a_batch(parts):
    """What is back-propagated is as narrow as short samples are, in batches no larger than the micro-batches."""

    class Recording(ToySource):
        asked: list[tuple[int, ...]]

        def batch(self, indices):
            self.asked.append(tuple(indices))
            return super().batch(indices)

    source = Recording(normal(8, 10, seed=0), batch_size=8, counts=COUNTS, lengths=LENGTHS)
    source.asked = []
    estimator, _ = addax(network())
    estimator.prepare(source, 0)
    size = 8 // parts
    micro_batches = [source.batch(range(start, start + size)) for start in range(0, 8, size)]
    source.asked.clear()
    estimator.estimate(micro_batches, 0)
    assert all(set(asked) <= set(LONG) or set(asked) <= set(SHORT) for asked in source.asked)
    assert max(map(len, source.asked)) <= size
    assert sorted(index for asked in source.asked for index in asked) == list(range(8))


def test_only_tensors_that_a_block_of_long_samples_reaches_have_a_gradient():
    objective, source = network(), toy_source([9] * 8)
    parameters = TrainableParameters(objective.module)
    blocks = (Block("bias", (0,)), Block("weight", (1,)))
    directions = BlockDirections(HashedDirections(parameters), blocks, order="cyclic")
    estimator, _ = addax(objective, directions=directions)
    estimator.prepare(source, 0)
    seen = []
    for step in range(2):
        estimator.estimate([source.batch(range(8))], step)
        seen.append([tensor.grad is not None and bool(tensor.grad.any()) for tensor in parameters.tensors])
        assert [tensor.grad is not None for tensor in parameters.tensors] == seen[-1]
    assert sorted(seen) == [[False, True], [True, False]]


def test_a_parameter_that_is_not_used_is_refused():
    objective, source = network(), toy_source()
    objective.network.register_parameter("unused", torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))
    estimator, _ = addax(objective)
    estimator.prepare(source, 0)
    with pytest.raises(UsageError, match="learn nothing, so leave them out: add unused"):
        estimator.estimate([source.batch(range(8))], 0)
