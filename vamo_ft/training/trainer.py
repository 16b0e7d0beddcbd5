"""The training loop."""

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from vamo_ft.core.errors import DivergenceError, StopRequested
from vamo_ft.core.memory import KEEP_LESS, largest_of, memory_explained
from vamo_ft.core.micro_batches import micro_batches_of
from vamo_ft.core.protocols import GradientEstimator, Progress, SampleSource, UpdateRule
from vamo_ft.core.types import Batch, Estimate
from vamo_ft.training.callbacks import Callback
from vamo_ft.training.state import RunState, StepRecord

__all__ = ["Trainer"]

_log = logging.getLogger("vamo_ft")


class Trainer:
    """Estimates, updates and tells the callbacks, until `num_steps` updates are done or `ends_early` says so.

    Callbacks act at step boundaries (before the first step, between steps and after the last) and after each update.
    A stop is honoured at a boundary, within a snapshot, a step and an evaluation; all leave a state that a checkpoint
    can hold, in which a step that was not finished has not begun. Steps that the state names as skipped do what is due
    before them, and make no update.
    """

    def __init__(
        self,
        *,
        source: SampleSource,
        estimator: GradientEstimator,
        update_rule: UpdateRule,
        learning_rate: Callable[[int], float],
        num_steps: int,
        micro_batch_size: int,
        callbacks: Sequence[Callback],
        progress: Progress,
        stop_requested: Callable[[], bool],
        state: RunState,
        ends_early: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.source = source
        self.estimator = estimator
        self.update_rule = update_rule
        self.learning_rate = learning_rate
        self.num_steps = num_steps
        self.micro_batch_size = micro_batch_size
        self.callbacks = callbacks
        self.progress = progress
        self.stop_requested = stop_requested
        self.state = state
        self.ends_early = ends_early
        self._ahead: tuple[int, list[Batch]] | None = None

    def train(self) -> None:
        """Runs to the end.

        Raises:
            StopRequested: a signal came; the callbacks have saved the run.
            DivergenceError: the loss or the estimate is not finite; the update was not made.
            DeviceMemoryError: names the part of the step that did not fit.
        """
        state = self.state
        try:
            with self.progress.task("training", self.num_steps, done=state.step) as task:
                while True:
                    for callback in self.callbacks:
                        callback.at_boundary(state)
                    if state.step >= self.num_steps or self.ends_early(state.step):
                        return
                    if self.stop_requested():
                        raise StopRequested(f"stopped after step {state.step}")
                    if (record := self._step()) is not None:
                        for callback in self.callbacks:
                            callback.after_step(state, record)
                        task.note(f"loss {record.loss:.4f}  {state.tokens / state.seconds:.0f} tokens/s")
                    task.advance()
        except StopRequested:
            for callback in self.callbacks:
                callback.on_stop(state)
            raise

    def _step(self) -> StepRecord | None:
        """One update; None where it is left out."""
        state, began = self.state, time.perf_counter()
        try:
            with memory_explained(
                "the work before a step (its snapshot)",
                remedy="lower training.forward_batch_tokens, keep the snapshot in host memory "
                "(method.snapshot.offload), or train an adapter (model.adapter)",
            ):
                state.work += self.estimator.prepare(self.source, state.step)
            if state.step in state.skipped:
                _log.info("step %d is left out: it diverged before", state.step + 1)
                state.step += 1
                return None
            micro_batches = self._micro_batches(state.step)
            try:
                estimate, record = self._update(micro_batches)
            except DivergenceError as error:
                samples = tuple(index for batch in micro_batches for index in batch.indices)
                raise DivergenceError(str(error), step=state.step, samples=samples) from None
            except StopRequested:
                raise StopRequested(f"stopped within step {state.step + 1}") from None
        finally:
            state.seconds += time.perf_counter() - began
        state.step += 1
        state.samples += sum(len(batch) for batch in micro_batches)
        state.tokens += sum(batch.num_tokens for batch in micro_batches)
        state.work += estimate.work
        return record

    def _update(self, micro_batches: Sequence[Batch]) -> tuple[Estimate, StepRecord]:
        state = self.state
        with memory_explained(
            lambda: f"a step (its largest micro-batch: {largest_of(micro_batches)})",
            remedy="lower training.micro_batch_size (or write auto) or data.max_length, or set "
            "training.activation_checkpointing",
        ):
            estimate = self.estimator.estimate(micro_batches, state.step)
            if state.step + 1 < self.num_steps:  # collated while the device computes: the next line waits for it
                self._ahead = state.step + 1, self._collated(state.step + 1)
            loss = _checked_loss(estimate, step=state.step)
        learning_rate = self.learning_rate(state.step) * state.learning_rate_scale
        with memory_explained(
            f"the update of a step (batch of {sum(map(len, micro_batches))} samples)",
            remedy=KEEP_LESS,
        ):
            measured = self.update_rule.apply(estimate, learning_rate=learning_rate, step=state.step)
        return estimate, StepRecord(loss, learning_rate, measured, estimate.metrics)

    def _micro_batches(self, step: int) -> list[Batch]:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == step else self._collated(step)

    def _collated(self, step: int) -> list[Batch]:
        return micro_batches_of(self.source, self.source.step_indices(step), self.micro_batch_size)


def _checked_loss(estimate: Estimate, *, step: int) -> float:
    """The mean loss, once it and the coefficients are known to be finite; waits for the device once."""
    finite = torch.ones((), dtype=torch.bool, device=estimate.loss.device)
    if estimate.projected is not None:
        finite = torch.isfinite(estimate.projected.coefficients).all()
    loss, coefficients_finite = torch.stack([estimate.loss.double(), finite.double()]).tolist()
    if not math.isfinite(loss):
        raise DivergenceError(f"step {step + 1}: the loss is {loss}; the update was not made")
    if not coefficients_finite:
        raise DivergenceError(f"step {step + 1}: a projected gradient is not finite; the update was not made")
    return float(loss)
