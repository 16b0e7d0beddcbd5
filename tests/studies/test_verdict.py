"""The sentence, both ways."""

from vamo_ft.studies.intervals import Interval
from vamo_ft.studies.verdict import judge_correction, judge_size


def tight(value: float) -> Interval:
    return Interval(value, value - 0.01, value + 0.01)


def test_a_correction_that_does_nothing() -> None:
    verdict = judge_correction(tight(1.0), tight(1.0), kappa=5 / 3, plain_method="adamw")
    assert verdict.outcome == "does not pay"
    assert verdict.text == (
        "with these settings the correction removes 0.0 % of the variance and costs 67 % more compute; "
        "a batch 1.67 times as large removes 40 %: use method.name: adamw"
    )


def test_a_correction_that_pays() -> None:
    verdict = judge_correction(tight(0.3), tight(0.2), kappa=2.0, plain_method="adamw")
    assert verdict.outcome == "pays"
    assert verdict.text == (
        "with these settings the correction removes 70.0 % of the variance and costs 100 % more compute; "
        "a batch 2.00 times as large removes 50 %: the correction pays"
    )


def test_what_lies_between() -> None:
    assert judge_correction(tight(0.5), tight(0.5), kappa=2.0, plain_method="sgd").outcome == "undecided"
    better = judge_correction(tight(1.8), tight(0.4), kappa=2.0, plain_method="sgd")
    assert better.outcome == "does not pay"
    assert "adds 80.0 % to the variance" in better.text
    assert better.text.endswith(
        "with the optimal coefficient it would remove 60 %, and pay: use method.alpha: adaptive"
    )
    assert judge_correction(tight(1.8), None, kappa=2.0, plain_method="sgd").text.endswith("use method.name: sgd")


def test_sizes() -> None:
    span = {"recommended": 1e-3, "usable": (1e-4, 1e-2)}
    assert judge_size("method.eps", 1e-2, **span) == "method.eps: 1.0e-02 is in the usable range, 1.0e-04 to 1.0e-02"
    assert judge_size("method.radius", 0.1, **span) == (
        "method.radius: 1.0e-01 is outside the usable range, 1.0e-04 to 1.0e-02: use 1.0e-03"
    )
