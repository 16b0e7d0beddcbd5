"""The variance-reduced relatives: what their names bring, and what they refuse."""

import pytest

from tests.config.examples import VALID, load_text, problems_of
from vamo_ft.config.period import Period

SGD = VALID.replace("  name: adamw\n", "")


def test_svrg_is_a_first_order_method() -> None:
    config = load_text(SGD, "method.name=svrg").config
    assert (config.optimizer.name, config.training.max_grad_norm) == ("sgd", 1.0)
    assert (config.method.alpha, config.method.alpha_decay) == (1.0, "linear")
    assert not config.method.projected
    assert load_text(VALID, "method.name=svrg").config.optimizer.name == "adamw"


@pytest.mark.parametrize(
    ("method", "every", "scale"), [("zo_svrg", Period(1, "epoch"), 1.0), ("mezo_svrg", Period(2, "step"), 10.0)]
)
def test_the_zeroth_order_ones_are_mezo_with_a_snapshot(method: str, every: Period, scale: float) -> None:
    config = load_text(SGD, f"method.name={method}", "model.adapter.type=lora").config
    assert (config.optimizer.name, config.training.max_grad_norm) == ("sgd", None)
    assert (config.method.directions.distribution, config.method.eps) == ("gaussian", 1e-2)
    assert (config.method.snapshot.every, config.method.full_step_scale) == (every, scale)
    assert config.method.projected
    assert load_text(SGD, f"method.name={method}").config.method.eps == 1e-3


@pytest.mark.parametrize(
    "optimizer", ["{name: adamw, learning_rate: 1}", "{name: sgd, momentum: 0.9, learning_rate: 1}"]
)
def test_a_second_learning_rate_needs_plain_sgd(optimizer: str) -> None:
    assert problems_of(SGD, "method.name=mezo_svrg", f"optimizer={optimizer}") == [
        "config.yaml:9: method.full_step_scale: 10 is a second learning rate, which only plain sgd takes; write 1.0, "
        "or optimizer.name: sgd without momentum"
    ]
    assert problems_of(SGD, "method.name=mezo_svrg", "method.full_step_scale=1.0", f"optimizer={optimizer}") == []
    assert problems_of(SGD, "method.name=zo_svrg", f"optimizer={optimizer}") == []


@pytest.mark.parametrize("method", ["zo_svrg", "mezo_svrg"])
def test_other_structures_are_refused(method: str) -> None:
    (found,) = problems_of(SGD, f"method.name={method}", "method.directions.structure=low_rank")
    assert found.startswith("--set method.directions.structure: zo_svrg takes full, not low_rank; leave it out, or")


@pytest.mark.parametrize("method", ["svrg", "zo_svrg", "mezo_svrg"])
def test_a_snapshot_over_few_samples_is_refused(method: str) -> None:
    settings = (f"method.name={method}", "method.snapshot.every=2 steps")
    (found,) = problems_of(SGD, *settings, "method.snapshot.set.subset=255")
    assert found.startswith("--set method.snapshot.set.subset: 255 is below 256 = 8 * every * training.batch_size")
    assert problems_of(SGD, *settings, "method.snapshot.set.subset=256") == []


@pytest.mark.parametrize(("method", "allowed"), [("svrg", False), ("zo_svrg", True), ("mezo_svrg", True)])
def test_a_metric_needs_a_method_without_gradients(method: str, allowed: bool) -> None:
    found = problems_of(SGD, f"method.name={method}", "objective={type: metric, name: f1}")
    assert (found == []) == allowed
    assert allowed or "metric has no gradient, which method.name: svrg needs" in found[0]
