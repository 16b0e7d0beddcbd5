"""Loss and accuracy over held-out samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from vamo_ft.core.errors import StopRequested
from vamo_ft.core.protocols import Objective, Progress, Runtime
from vamo_ft.core.types import Batch

__all__ = ["EvaluationResult", "EvaluationSource", "evaluate"]


class EvaluationSource(Protocol):
    """Held-out samples in forward-only batches."""

    @property
    def num_samples(self) -> int:
        """Number of samples."""

    def batches(self, *, token_budget: int) -> Iterator[Batch]:
        """Batches for `Objective.evaluate`, rows times longest row within `token_budget`."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Means over the evaluation set.

    Attributes:
        loss: per supervised token (per sample for a classifier head).
        accuracy: share of samples classified rightly; None where nothing is classified.
        num_samples: samples evaluated.
    """

    loss: float
    accuracy: float | None
    num_samples: int


@torch.no_grad()
def evaluate(
    objective: Objective,
    source: EvaluationSource,
    runtime: Runtime,
    *,
    token_budget: int,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> EvaluationResult:
    """One pass over `source` with dropout off.

    Raises:
        StopRequested: between two batches.
    """
    objective.module.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)  # loss, weight, right answers
    classified = False
    with progress.task("evaluation", source.num_samples) as task:
        for batch in source.batches(token_budget=token_budget):
            if stop_requested():
                raise StopRequested("stopped in an evaluation")
            with runtime.autocast():
                terms = objective.evaluate(batch.to(runtime.device))
            totals[0] += terms.loss.total.double().sum()
            totals[1] += terms.loss.count.double().sum()
            if terms.correct is not None:
                classified = True
                totals[2] += terms.correct.sum()
            task.advance(len(batch))
    loss, weight, correct = totals.tolist()
    return EvaluationResult(loss / weight, correct / source.num_samples if classified else None, source.num_samples)
