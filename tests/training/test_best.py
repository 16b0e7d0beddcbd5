import math

import pytest

from vamo_ft.training.best import Ranking


def history(metric: str, *values: float) -> list[dict[str, float]]:
    """Evaluations at steps 0, 10, 20 ..."""
    return [{"step": 10 * index, f"eval.{metric}": value} for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [
        ("loss", (0.1, 0.9, 0.4, 0.5), 20),  # the untrained model's 0.1 is not asked
        ("accuracy", (0.9, 0.5, 0.7, 0.6), 20),
        ("f1", (0.0, 0.5, 0.7, 0.7), 20),  # of equal ones the earliest
        ("loss", (0.1, math.nan, math.inf, 0.5), 30),
        ("loss", (0.1, math.nan), None),
        ("loss", (0.1,), None),
    ],
)
def test_the_best_evaluation(metric: str, values: tuple[float, ...], step: int | None) -> None:
    best = Ranking(metric, lower_is_better=metric == "loss").best(history(metric, *values))
    assert (None if best is None else best["step"]) == step


@pytest.mark.parametrize(
    ("metric", "patience", "threshold", "values", "ends_at"),
    [
        ("loss", 1, 0.0, (9, 5, 4, 4), 3),
        ("loss", 2, 0.0, (9, 5, 4, 6, 3, 4, 3), 6),  # an improvement starts the count anew
        ("loss", 2, 1.0, (9, 5, 4.5, 3.9, 3.5, 3), 5),  # 3.9 is more than 1 below 5; 3.5 and 3 are not below 2.9
        ("accuracy", 2, 0.0, (0.9, 0.5, 0.6, 0.6, 0.6), 4),
        ("accuracy", None, 0.0, (0.9, 0.5, 0.4, 0.3, 0.2), None),
        ("loss", 2, 0.0, (1, math.nan, math.nan), 2),
        ("loss", 3, 0.0, (1, math.nan, 5, 6, 4), None),
    ],
)
def test_patience(
    metric: str, patience: int | None, threshold: float, values: tuple[float, ...], ends_at: int | None
) -> None:
    ranking, lines = (
        Ranking(metric, lower_is_better=metric == "loss", patience=patience, threshold=threshold),
        history(metric, *values),
    )
    exhausted = [index for index in range(len(lines)) if ranking.is_exhausted(lines[: index + 1])]
    assert (exhausted[0] if exhausted else None) == ends_at
