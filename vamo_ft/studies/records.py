"""What is known of a comparison's runs, as it is kept on disk."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vamo_ft.config.budget import Currency
from vamo_ft.core.types import Batch, EvaluationTerms
from vamo_ft.studies.budget import spent
from vamo_ft.training.sinks import finite

__all__ = ["Point", "RunRecord", "SampleScores", "read_metrics"]

State = Literal["finished", "out of time", "diverged"]


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run stood at one of its evaluations.

    Attributes:
        step: updates done.
        spent: so far, in the budget's currency.
        values: held-out loss and scores by name; None where they are not finite.
    """

    step: int
    spent: float
    values: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run that has ended.

    Attributes:
        label: its method.
        learning_rate: peak.
        seed: of sample order, adapter and directions.
        tuning: whether it was there to choose the learning rate.
        state: finished; out of time, stopped by the clock before its planned end; or diverged.
        message: what was said of a run that diverged.
        steps: updates made.
        spent: in the budget's currency.
        evaluations: forward + 2 x backward samples.
        tokens: likewise, input tokens.
        flops: by the ledger.
        seconds: of training.
        peak_memory_bytes: largest memory of the process in the run.
        points: its evaluations, the one before training first.
        final: held-out loss and scores of its final model; None where it has none, or they are not finite.
    """

    label: str
    learning_rate: float
    seed: int
    tuning: bool
    state: State
    message: str | None
    steps: int
    spent: float
    evaluations: int
    tokens: int
    flops: int
    seconds: float
    peak_memory_bytes: int
    points: Sequence[Point]
    final: Mapping[str, float] | None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "RunRecord":
        """Restores `plain`."""
        return cls(**{**values, "points": [Point(**point) for point in values["points"]]})


@dataclass(frozen=True, slots=True)
class SampleScores:
    """What a final model makes of each held-out sample.

    Attributes:
        indices: of the samples, ascending.
        weights: (n,) their tokens (or 1), by which losses are averaged.
        values: by name (n,): summed losses as `loss`, and scores from 0 to 1.
    """

    indices: list[int]
    weights: Tensor
    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, seen: Sequence[tuple[Batch, EvaluationTerms]]) -> "SampleScores":
        """From the batches of an evaluation, in the order of the samples."""
        indices = [index for batch, _ in seen for index in batch.indices]
        order = sorted(range(len(indices)), key=indices.__getitem__)

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([part.detach().double().cpu() for part in parts])[order]

        values = {"loss": joined([terms.loss.total for _, terms in seen])}
        values |= {name: joined([terms.scores[name] for _, terms in seen]) for name in seen[0][1].scores}
        return cls([indices[place] for place in order], joined([terms.loss.count for _, terms in seen]), values)

    def weights_of(self, name: str) -> Tensor:
        """(n,) what values of that name are divided by in the mean."""
        return self.weights if name == "loss" else torch.ones_like(self.weights)

    def means(self) -> dict[str, float] | None:
        """Loss and scores over all samples; None where one is not finite."""
        means = {name: float(value.sum() / self.weights_of(name).sum()) for name, value in self.values.items()}
        return means if all(map(math.isfinite, means.values())) else None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {name: value.tolist() for name, value in self.values.items()}
        plain: dict[str, Any] = finite({"indices": self.indices, "weights": self.weights.tolist(), "values": values})
        return plain

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "SampleScores":
        """Restores `plain` of a model whose losses are finite."""

        def tensor(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float64)

        named = {name: tensor(numbers) for name, numbers in values["values"].items()}
        return cls(list(values["indices"]), tensor(values["weights"]), named)


def read_metrics(path: Path, currency: Currency) -> tuple[list[Point], dict[str, Any] | None]:
    """A run's evaluations with what had been spent at each, and its last training line."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    training = {line["step"]: line for line in lines if "forward_evals" in line}
    points = []
    for line in lines:
        step = line["step"]
        if "eval.samples" in line and (step == 0 or step in training):
            values = {
                name.removeprefix("eval."): value
                for name, value in line.items()
                if name.startswith("eval.") and name not in ("eval.samples", "eval.seconds")
            }
            points.append(Point(step, spent(training[step], currency) if step else 0.0, values))
    return points, training[max(training)] if training else None
