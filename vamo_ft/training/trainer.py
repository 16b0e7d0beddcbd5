"""The training loop."""

import math
import time
from collections.abc import Callable, Sequence

from vamo_ft.core.errors import DivergenceError, StopRequested
from vamo_ft.core.protocols import GradientEstimator, Progress, SampleSource, UpdateRule
from vamo_ft.core.types import Batch
from vamo_ft.training.callbacks import Callback
from vamo_ft.training.state import RunState, StepRecord

__all__ = ["Trainer"]


class Trainer:
    """Estimates, updates and tells the callbacks, until `num_steps` updates are done.

    Callbacks act at step boundaries (before the first step, between steps and after the last) and after each update.
    A stop is honoured at a boundary, within a snapshot and within an evaluation; all leave a state that a checkpoint
    can hold.
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

    def train(self) -> None:
        """Runs to the end.

        Raises:
            StopRequested: a signal came; the callbacks have saved the run.
            DivergenceError: the loss is not finite; the update was not made.
        """
        state = self.state
        try:
            with self.progress.task("training", self.num_steps, done=state.step) as task:
                while True:
                    for callback in self.callbacks:
                        callback.at_boundary(state)
                    if state.step >= self.num_steps:
                        return
                    if self.stop_requested():
                        raise StopRequested(f"stopped after step {state.step}")
                    record = self._step()
                    for callback in self.callbacks:
                        callback.after_step(state, record)
                    task.note(f"loss {record.loss:.4f}  {state.tokens / state.seconds:.0f} tokens/s")
                    task.advance()
        except StopRequested:
            for callback in self.callbacks:
                callback.on_stop(state)
            raise

    def _step(self) -> StepRecord:
        state, began = self.state, time.perf_counter()
        try:
            state.work += self.estimator.prepare(self.source, state.step)
            micro_batches = self._micro_batches(state.step)
            estimate = self.estimator.estimate(micro_batches, state.step)
            loss = float(estimate.loss)
            if not math.isfinite(loss):
                raise DivergenceError(f"step {state.step + 1}: the loss is {loss}; the update was not made")
            learning_rate = self.learning_rate(state.step)
            measured = self.update_rule.apply(estimate, learning_rate=learning_rate, step=state.step)
        finally:
            state.seconds += time.perf_counter() - began
        state.step += 1
        state.samples += sum(len(batch) for batch in micro_batches)
        state.tokens += sum(batch.num_tokens for batch in micro_batches)
        state.work += estimate.work
        return StepRecord(loss, learning_rate, measured, estimate.metrics)

    def _micro_batches(self, step: int) -> list[Batch]:
        indices, size = self.source.step_indices(step), self.micro_batch_size
        return [self.source.batch(indices[start : start + size]) for start in range(0, len(indices), size)]
