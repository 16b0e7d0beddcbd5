"""Loss and scores over held-out samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vamo_ft.core.errors import StopRequested
from vamo_ft.core.memory import largest_of, memory_explained
from vamo_ft.core.protocols import Objective, Progress, Runtime
from vamo_ft.core.types import Batch, EvaluationTerms

__all__ = ["EvaluationResult", "EvaluationSource", "Observer", "evaluate"]

Observer = Callable[[Batch, EvaluationTerms], None]
"""Is shown every batch and what was learnt of it."""


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

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, which has its meaning where the loss is per token of free text; infinite from e^710 on."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def evaluate(
    objective: Objective,
    source: EvaluationSource,
    runtime: Runtime,
    *,
    token_budget: int,
    progress: Progress,
    stop_requested: Callable[[], bool],
    observers: Sequence[Observer] = (),
) -> EvaluationResult:
    """One pass over `source` with dropout off, shared out over processes; collective.

    Args:
        observers: are shown every batch that falls to this process, on the host, with its terms.

    Raises:
        StopRequested: between two batches.
        DeviceMemoryError: names the batch that did not fit.
    """
    objective.module.eval()
    loss, weight = torch.zeros(2, dtype=torch.float64, device=runtime.device).unbind()
    scores: dict[str, Tensor] = {}
    with progress.task("evaluation", source.num_samples) as task:
        for dealt, batch, counts in runtime.rounds(source.batches(token_budget=token_budget)):
            if stop_requested():
                raise StopRequested("stopped in an evaluation")
            task.advance(sum(map(len, dealt)))
            if batch is None:
                continue
            with _memory_of(batch), runtime.autocast():
                terms = objective.evaluate(batch.to(runtime.device))
            if not counts:
                continue
            loss += terms.loss.total.double().sum()
            weight += terms.loss.count.double().sum()
            for name, score in terms.scores.items():
                scores[name] = scores.get(name, 0) + score.double().sum()
            for observe in observers:
                observe(batch, terms)
    scores = {name: scores.get(name, torch.zeros_like(loss)) for name in runtime.agreed(sorted(scores))}
    runtime.sum_([loss, weight, *scores.values()])
    means = {name: score.item() / source.num_samples for name, score in scores.items()}
    return EvaluationResult(loss.item() / weight.item(), means, source.num_samples)


def _memory_of(batch: Batch) -> AbstractContextManager[None]:
    return memory_explained(
        lambda: f"an evaluation (a batch of {largest_of([batch])})",
        remedy="lower training.forward_batch_tokens or data.max_length",
    )
