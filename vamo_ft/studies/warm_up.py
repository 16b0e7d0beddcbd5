"""Takes a subject some steps along its training, in memory only."""

import math
from dataclasses import dataclass

from vamo_ft.assemble import Subject
from vamo_ft.core.errors import DivergenceError, UsageError
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.protocols import GradientEstimator
from vamo_ft.core.runtime import free_memory_bytes

__all__ = ["Informed", "informed_directions", "train"]

_MEMORY_SHARE = 0.5  # of the free memory, for directions that are there for comparison only


@dataclass(frozen=True, slots=True)
class Informed:
    """Informed directions, or why there are none.

    Attributes:
        directions: the configured ones where those are informed, else some of the same number for comparison.
        reason: why there are none.
    """

    directions: GradientSubspace | None
    reason: str | None


def informed_directions(subject: Subject, steps: int) -> Informed:
    """As many informed directions as the method has probes, where memory and training steps allow.

    Raises:
        UsageError: the configured ones need more steps than are to be trained.
    """
    configured, size = subject.directions, subject.num_probes
    if isinstance(configured, GradientSubspace):
        if steps < configured.warmup:
            raise UsageError(
                f"--steps {steps}: method.directions.warmup_steps asks for {configured.warmup} before the first "
                "snapshot; train more steps, or lower it"
            )
        return Informed(configured, None)
    if steps <= size:
        return Informed(None, f"{size} of them take more than {size} training steps")
    needed = GradientSubspace.state_bytes(subject.parameters.numel, size)
    if needed > _MEMORY_SHARE * free_memory_bytes(subject.parameters.device):
        return Informed(None, f"they would take {needed / 1e9:.1f} GB")
    return Informed(GradientSubspace(subject.parameters, size=size, warmup=size + 1), None)


def train(subject: Subject, steps: range, *, informed: GradientSubspace | None, estimator: GradientEstimator) -> None:
    """Updates with the run's batches, optimizer and learning rates; every mini-batch gradient feeds `informed`.

    Raises:
        DivergenceError: the loss is not finite.
    """
    with subject.progress.task("training", len(steps)) as task:
        for step in steps:
            batches = subject.micro_batches(subject.source.step_indices(step))
            if informed is not None and estimator is not subject.first_order:
                subject.first_order.estimate(batches, step)
                informed.observe(subject.parameters.gradients())
                subject.parameters.clear_gradients()
            estimate = estimator.estimate(batches, step)
            if informed is not None and estimator is subject.first_order:
                informed.observe(subject.parameters.gradients())
            loss = float(estimate.loss)
            if not math.isfinite(loss):
                raise DivergenceError(f"step {step + 1}: the loss is {loss}; nothing was measured")
            subject.update_rule.apply(estimate, learning_rate=subject.learning_rate(step), step=step)
            task.advance()
