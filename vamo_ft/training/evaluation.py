"""Loss and scores over held-out samples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vamo_ft.core.errors import StopRequested
from vamo_ft.core.memory import largest_of, memory_explained
from vamo_ft.core.protocols import Objective, Progress, Runtime
from vamo_ft.core.types import Batch, EvaluationTerms

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
        scores: by name, such as the share of samples classified rightly as `accuracy`; what the objective gives.
        num_samples: samples evaluated.
    """

    loss: float
    scores: Mapping[str, float]
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
    observe: Callable[[Batch, EvaluationTerms], None] = lambda batch, terms: None,
) -> EvaluationResult:
    """One pass over `source` with dropout off.

    Args:
        observe: is shown every batch with its samples' losses and scores.

    Raises:
        StopRequested: between two batches.
        DeviceMemoryError: names the batch that did not fit.
    """
    objective.module.eval()
    loss, weight = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    scores: dict[str, Tensor] = {}
    with progress.task("evaluation", source.num_samples) as task:
        for batch in source.batches(token_budget=token_budget):
            if stop_requested():
                raise StopRequested("stopped in an evaluation")
            with _memory_of(batch), runtime.autocast():
                terms = objective.evaluate(batch.to(runtime.device))
            observe(batch, terms)
            loss += terms.loss.total.double().sum()
            weight += terms.loss.count.double().sum()
            for name, score in terms.scores.items():
                scores[name] = scores.get(name, 0) + score.double().sum()
            task.advance(len(batch))
    means = {name: score.item() / source.num_samples for name, score in scores.items()}
    return EvaluationResult(loss.item() / weight.item(), means, source.num_samples)


def _memory_of(batch: Batch) -> AbstractContextManager[None]:
    return memory_explained(
        lambda: f"an evaluation (a batch of {largest_of([batch])})",
        remedy="lower training.forward_batch_tokens, data.max_length or evaluation.max_new_tokens",
    )
