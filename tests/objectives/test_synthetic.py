import torch

from tests.toys import ToySource, exact_gradient, least_squares, normal
from vamo_ft.objectives.synthetic import Quadratic


def test_quadratic_has_the_stated_value_and_gradient():
    features, curvature = normal(5, 4, seed=0), normal(4, seed=1).abs()
    start = normal(4, seed=2)
    objective = Quadratic(start, curvature=curvature)
    batch = ToySource(features, batch_size=5).batch(range(5))
    values = 0.5 * ((start - features) ** 2 * curvature).sum(1)
    assert torch.allclose(objective.terms(batch).total, values)
    assert torch.allclose(exact_gradient(objective, batch), curvature * (start - features.mean(0)))


def test_nonconvex_least_squares_has_the_stated_value_and_gradient():
    objective, source = least_squares(num_samples=6, dimension=3, batch_size=6)
    x = next(objective.module.parameters()).detach()
    batch = source.batch(range(6))
    p = 1 / (1 + torch.exp(-source.features @ x))
    assert torch.allclose(objective.terms(batch).total, (source.targets - p) ** 2)
    expected = (2 * (p - source.targets) * p * (1 - p)).unsqueeze(1) * source.features
    assert torch.allclose(exact_gradient(objective, batch), expected.mean(0))
