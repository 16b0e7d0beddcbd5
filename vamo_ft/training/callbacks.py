"""What happens around a step: metrics, evaluation, checkpoints."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vamo_ft.core.errors import SaveError
from vamo_ft.core.protocols import StateDict
from vamo_ft.training.best import Ranking
from vamo_ft.training.evaluation import EvaluationResult
from vamo_ft.training.ledger import Ledger
from vamo_ft.training.sinks import MetricsWriter
from vamo_ft.training.state import RunState, StepRecord

__all__ = ["Callback", "Checkpointer", "Evaluator", "MetricsLogger", "warn_of_failed_save"]

_log = logging.getLogger("vamo_ft")

Due = Callable[[int], bool]
"""Whether a period ends with step number `step` (counted from 1)."""


class Callback:
    """Does nothing; callbacks override what they need."""

    def at_boundary(self, state: RunState) -> None:
        """Before the first step, between steps and after the last. A resumed run starts at the boundary it left."""

    def after_step(self, state: RunState, record: StepRecord) -> None:
        """After every update."""

    def on_stop(self, state: RunState) -> None:
        """The run was asked to stop and is about to."""


class MetricsLogger(Callback):
    """Writes training lines to metrics.jsonl and the log; the loss is the mean since the line before."""

    def __init__(
        self, writer: MetricsWriter, *, due: Due, num_steps: int, ledger: Ledger, samples_per_epoch: int
    ) -> None:
        self._writer = writer
        self._due = due
        self._num_steps = num_steps
        self._ledger = ledger
        self._samples_per_epoch = samples_per_epoch
        self._loss_sum = 0.0
        self._losses = 0
        self._tokens = 0
        self._seconds = 0.0

    def after_step(self, state: RunState, record: StepRecord) -> None:
        """Writes a line when one is due, and after the last step."""
        self._loss_sum += record.loss
        self._losses += 1
        if not (self._due(state.step) or state.step == self._num_steps):
            return
        seconds = state.seconds - self._seconds
        line: dict[str, Any] = {
            "step": state.step,
            "epoch": state.samples / self._samples_per_epoch,
            "loss": self._loss_sum / self._losses,
            "learning_rate": record.learning_rate,
            **_as_numbers(record.measured),
            "tokens": state.tokens,
            "samples": state.samples,
            **self._ledger.figures(state.work, seconds=state.seconds),
            "tokens_per_second": (state.tokens - self._tokens) / seconds if seconds > 0 else None,
            **{f"method.{name}": value for name, value in _as_numbers(record.metrics).items()},
        }
        self._writer.write(line)
        _log.info(
            "step %d of %d  loss %.4f  lr %.3g  %.0f tokens/s",
            state.step,
            self._num_steps,
            line["loss"],
            record.learning_rate,
            line["tokens_per_second"] or 0,
        )
        self._loss_sum, self._losses = 0.0, 0
        self._tokens, self._seconds = state.tokens, state.seconds

    def state_dict(self) -> StateDict:
        """The sums since the last line, and how much of the file belongs to the run so far."""
        self._writer.flush()
        return {
            "loss_sum": self._loss_sum,
            "losses": self._losses,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "length": self._writer.length,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict` and cuts the file back, so that no step is written twice."""
        self._loss_sum, self._losses = state["loss_sum"], state["losses"]
        self._tokens, self._seconds = state["tokens"], state["seconds"]
        self._writer.truncate_to(state["length"])


class Evaluator(Callback):
    """Evaluates before the first step, every period and after the last step; writes `eval.*` lines.

    Args:
        metrics: what of a result is written, `loss` or the name of a score.
        identity: fingerprint of the held-out samples and of how they are scored.
        ranking: which evaluation is the best and when the run ends for want of a better one; None: neither is asked.
    """

    def __init__(
        self,
        run: Callable[[], EvaluationResult],
        writer: MetricsWriter,
        *,
        metrics: Sequence[str],
        identity: str,
        due: Due,
        num_steps: int,
        ranking: Ranking | None = None,
    ) -> None:
        self._run = run
        self._writer = writer
        self._metrics = list(metrics)
        self._identity = identity
        self._due = due
        self._num_steps = num_steps
        self.ranking = ranking
        self._evaluated: int | None = None
        self.history: list[dict[str, Any]] = []

    def at_boundary(self, state: RunState) -> None:
        """Evaluates when it is due and has not been done at this step."""
        step = state.step
        if self._evaluated == step or not (step in (0, self._num_steps) or self._due(step)):
            return
        began = time.perf_counter()
        result = self._run()
        values = {"loss": result.loss, **result.scores}
        shown = {name: values[name] for name in self._metrics}
        line: dict[str, Any] = {"step": step, **{f"eval.{name}": value for name, value in shown.items()}}
        self._writer.write({**line, "eval.samples": result.num_samples, "eval.seconds": time.perf_counter() - began})
        _log.info("evaluation at step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        self.history.append(line)
        self._evaluated = step

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best evaluation so far, where they are ranked."""
        return None if self.ranking is None else self.ranking.best(self.history)

    def gives_up(self, step: int) -> bool:
        """Whether the run ends with the evaluation of `step`, because it and those before brought no improvement."""
        return self.ranking is not None and self._evaluated == step and self.ranking.is_exhausted(self.history)

    def state_dict(self) -> StateDict:
        """The last step that was evaluated, the results so far, and what they are results of."""
        return {
            "evaluated": self._evaluated,
            "history": self.history,
            "metrics": self._metrics,
            "identity": self._identity,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`; results on other data, or of other metrics, are not comparable and are dropped."""
        if (state["metrics"], state["identity"]) == (self._metrics, self._identity):
            self._evaluated, self.history = state["evaluated"], list(state["history"])


class Checkpointer(Callback):
    """Saves every period, after the last step, when the run is stopped, and after a rollback, so that it is kept.

    Args:
        ends_early: whether the run ends with a step before its last one.
        saved: the state that is on disk.
        at_start: save before the first step too, so that there is always a checkpoint to go back to.
        tolerant: whether a save that fails at the end of a period is only warned of.
    """

    def __init__(
        self,
        save: Callable[[RunState], None],
        *,
        due: Due,
        num_steps: int,
        saved: RunState | None,
        at_start: bool = False,
        tolerant: bool = False,
        ends_early: Due = lambda step: False,
    ) -> None:
        self._save = save
        self._due: Due = lambda step: due(step) or step == num_steps or ends_early(step)
        self._saved = _progress_of(saved)
        self._rollbacks = 0 if saved is None else saved.rollbacks
        self._at_start = at_start
        self._tolerant = tolerant

    def at_boundary(self, state: RunState) -> None:
        """Saves when it is due and this step is not saved yet."""
        due = self._due(state.step)
        if state.rollbacks != self._rollbacks or (due if state.step > 0 else self._at_start):
            try:
                self.on_stop(state)
            except SaveError as error:
                if not self._tolerant:
                    raise
                warn_of_failed_save(error)

    def on_stop(self, state: RunState) -> None:
        """Saves, unless nothing was computed since; more of a snapshot takes the place of less of it.

        Raises:
            SaveError: it failed. A stop whose checkpoint is missing is none, whatever the setting.
        """
        if _progress_of(state) != self._saved:
            self._save(state)
            self._saved, self._rollbacks = _progress_of(state), state.rollbacks


def warn_of_failed_save(error: SaveError) -> None:
    """Says that the run continues all the same."""
    _log.warning("%s; the run continues, as checkpoint.on_error says", error)


def _progress_of(state: RunState | None) -> tuple[int, float] | None:
    """Changes with every step and with every part of a snapshot."""
    return None if state is None else (state.step, state.seconds)


def _as_numbers(values: Mapping[str, Tensor | float | None]) -> dict[str, float | None]:
    return {name: float(value) if isinstance(value, Tensor) else value for name, value in values.items()}
