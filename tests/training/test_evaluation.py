import math

import pytest
import torch

from tests.toys import NetworkObjective, SilentProgress, TinyNetwork, ToySource, normal
from vamo_ft.core.errors import StopRequested
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import EvaluationTerms
from vamo_ft.training.evaluation import EvaluationResult, evaluate


class HeldOut(ToySource):
    def batches(self, *, token_budget: int):
        for group in self.groups(range(self.num_samples), token_budget=token_budget):
            yield self.batch(group)


class Classifier(NetworkObjective):
    def evaluate(self, batch) -> EvaluationTerms:
        features = batch.inputs["features"]
        return EvaluationTerms(
            self.terms(batch), {"accuracy": (features[:, 0] > 0).float(), "f1": features[:, 1].abs()}
        )


def run(objective, source, *, token_budget: int = 3, stop_requested=lambda: False):
    return evaluate(
        objective,
        source,
        LocalRuntime(),
        token_budget=token_budget,
        progress=SilentProgress(),
        stop_requested=stop_requested,
    )


def test_loss_is_the_weighted_mean_and_scores_the_plain_mean_whatever_the_batches():
    source = HeldOut(normal(10, 4, seed=0), batch_size=1, counts=torch.arange(10) + 1.0)
    objective = Classifier(TinyNetwork(4, dtype=torch.float64, dropout=0.5))
    objective.module.eval()
    terms = objective.terms(source.batch(range(10)))
    expected = (terms.total.sum() / terms.count.sum()).item()
    objective.module.train()
    for token_budget in (1, 3, 10):
        result = run(objective, source, token_budget=token_budget)
        assert result.loss == pytest.approx(expected, rel=1e-12)
        assert list(result.scores) == ["accuracy", "f1"]
        assert result.scores["accuracy"] == (source.features[:, 0] > 0).double().mean().item()
        assert result.scores["f1"] == pytest.approx(source.features[:, 1].abs().mean().item(), rel=1e-12)
        assert result.num_samples == 10


def test_there_are_no_scores_where_nothing_is_scored():
    source = HeldOut(normal(4, 4, seed=0), batch_size=1)
    assert run(NetworkObjective(TinyNetwork(4, dtype=torch.float64)), source).scores == {}


def test_a_stop_is_honoured_between_batches():
    polls = iter([False, True])
    source = HeldOut(normal(9, 4, seed=0), batch_size=1)
    with pytest.raises(StopRequested):
        run(NetworkObjective(TinyNetwork(4, dtype=torch.float64)), source, stop_requested=lambda: next(polls))


def test_perplexity_is_the_exponential_of_the_loss_without_an_overflow():
    assert EvaluationResult(1.5, {}, 1).perplexity == math.exp(1.5)
    assert EvaluationResult(1e4, {}, 1).perplexity == math.inf
    assert math.isnan(EvaluationResult(math.nan, {}, 1).perplexity)


def test_an_observer_sees_every_sample_with_its_own_terms():
    source = HeldOut(normal(10, 4, seed=0), batch_size=1)
    objective = Classifier(TinyNetwork(4, dtype=torch.float64))
    seen = {}

    def observe(batch, terms):
        seen.update(zip(batch.indices, zip(terms.loss.total, terms.scores["f1"], strict=True), strict=True))

    evaluate(
        objective,
        source,
        LocalRuntime(),
        token_budget=3,
        progress=SilentProgress(),
        stop_requested=lambda: False,
        observers=[observe],
    )
    assert sorted(seen) == list(range(10))
    for index, (loss, score) in seen.items():
        torch.testing.assert_close(loss, objective.terms(source.batch([index])).total[0])
        assert score == source.features[index, 1].abs()
