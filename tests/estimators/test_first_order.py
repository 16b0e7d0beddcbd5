import torch

from tests.toys import NetworkObjective, TinyNetwork, ToySource, exact_gradient, gradient, normal
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.estimators.first_order import FirstOrder


def test_equals_autograd_on_the_whole_batch_whatever_the_cut():
    counts = torch.tensor([1.0, 7.0, 2.0, 30.0, 1.0, 1.0])
    source = ToySource(normal(6, 10, seed=0), batch_size=6, counts=counts)
    objective = NetworkObjective(TinyNetwork(10, dtype=torch.float64))
    estimator = FirstOrder(objective, TrainableParameters(objective.module), LocalRuntime(), seed=0)
    expected = exact_gradient(objective, source.batch(range(6)))
    for cuts in ([range(6)], [range(2), range(2, 3), range(3, 6)]):
        estimator.estimate([source.batch(cut) for cut in cuts], 0)
        assert torch.allclose(gradient(objective), expected, rtol=1e-12, atol=1e-14)


def test_dropout_is_on_and_differs_between_micro_batches_and_steps():
    source = ToySource(torch.ones(2, 10, dtype=torch.float64), batch_size=2)
    objective = NetworkObjective(TinyNetwork(10, dtype=torch.float64, dropout=0.5))
    estimator = FirstOrder(objective, TrainableParameters(objective.module), LocalRuntime(), seed=0)

    def losses(step: int) -> list[float]:
        """The same sample at both micro-batch positions."""
        result = []
        for position in range(2):
            empty = source.batch([0])
            empty.counts.zero_()
            batches = [empty, empty]
            batches[position] = source.batch([0])
            result.append(float(estimator.estimate(batches, step).loss))
        return result

    seen = [loss for step in range(12) for loss in losses(step)]
    assert len(set(seen)) > 3
    assert losses(3) == losses(3)
    assert any(first != second for first, second in map(losses, range(12)))
