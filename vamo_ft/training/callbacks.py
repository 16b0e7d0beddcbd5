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
from vamo_ft.training.sinks import Metrics
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
    """Writes training lines to metrics.jsonl and the log; the loss is the mean since the line before.

    A step that makes no update has no line. Where that is the last one, the steps since the line before have one all
    the same, without the figures of an update.
    """

    def __init__(self, writer: Metrics, *, due: Due, num_steps: int, ledger: Ledger, samples_per_epoch: int) -> None:
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
        if self._due(state.step) or state.step == self._num_steps:
            self._write(state, record)

    def at_boundary(self, state: RunState) -> None:
        """Writes what is left where the last step made no update."""
        if state.step == self._num_steps and self._losses:
            self._write(state, None)

    def _write(self, state: RunState, record: StepRecord | None) -> None:
        update: dict[str, Any] = {}
        method: dict[str, Any] = {}
        if record is not None:
            update = {"learning_rate": record.learning_rate, **_as_numbers(record.measured)}
            method = {f"method.{name}": value for name, value in _as_numbers(record.metrics).items()}
        seconds = state.seconds - self._seconds
        line: dict[str, Any] = {
            "step": state.step,
            "epoch": state.samples / self._samples_per_epoch,
            "loss": self._loss_sum / self._losses,
            **update,
            "tokens": state.tokens,
            "samples": state.samples,
            **self._ledger.figures(state.work, seconds=state.seconds),
            "tokens_per_second": (state.tokens - self._tokens) / seconds if seconds > 0 else None,
            **method,
        }
        self._writer.write(line)
        _log.info(
            "step %d of %d  loss %.4f  lr %s  %.0f tokens/s",
            state.step,
            self._num_steps,
            line["loss"],
            "-" if record is None else f"{record.learning_rate:.3g}",
            line["tokens_per_second"] or 0,
        )
        self._loss_sum, self._losses = 0.0, 0
        self._tokens, self._seconds = state.tokens, state.seconds

    def state_dict(self) -> StateDict:
        """The sums since the last line, how much of the file belongs to the run so far, and what waits for room."""
        self._writer.flush()
        return {
            "loss_sum": self._loss_sum,
            "losses": self._losses,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "length": self._writer.length,
            "waiting": self._writer.waiting,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict` and cuts the file back, so that no step is written twice."""
        self._loss_sum, self._losses = state["loss_sum"], state["losses"]
        self._tokens, self._seconds = state["tokens"], state["seconds"]
        self._writer.truncate_to(state["length"])
        self._writer.write_lines(state.get("waiting", []))  # checkpoints of earlier versions have none


class Evaluator(Callback):
    """Evaluates before the first step, every period and after the last step; writes `eval.*` lines.

    Args:
        metrics: what of a result is written, `loss` or the name of a score.
        identity: fingerprint of the held-out samples and of how they are scored.
        ranking: which evaluation is the best and when the run ends for want of a better one; None: neither is asked.

    Attributes:
        evaluated: the last step that was evaluated; None before the first.
        history: the lines so far.
    """

    def __init__(
        self,
        run: Callable[[], EvaluationResult],
        writer: Metrics,
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
        self.evaluated: int | None = None
        self.ranking = ranking
        self.history: list[dict[str, Any]] = []

    def at_boundary(self, state: RunState) -> None:
        """Evaluates when it is due and has not been done at this step."""
        step = state.step
        if self.evaluated == step or not (step in (0, self._num_steps) or self._due(step)):
            return
        began = time.perf_counter()
        result = self._run()
        values = {"loss": result.loss, "perplexity": result.perplexity, **result.scores}
        shown = {name: values[name] for name in self._metrics}
        line: dict[str, Any] = {"step": step, **{f"eval.{name}": value for name, value in shown.items()}}
        self._writer.write({**line, "eval.samples": result.num_samples, "eval.seconds": time.perf_counter() - began})
        _log.info("evaluation at step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        self.history.append(line)
        self.evaluated = step

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best evaluation so far, where they are ranked."""
        return None if self.ranking is None else self.ranking.best(self.history)

    def gives_up(self, step: int) -> bool:
        """Whether the run ends with the evaluation of `step`, because it and those before brought no improvement."""
        return self.ranking is not None and self.evaluated == step and self.ranking.is_exhausted(self.history)

    def state_dict(self) -> StateDict:
        """The last step that was evaluated, the results so far, and what they are results of."""
        return {
            "evaluated": self.evaluated,
            "history": self.history,
            "metrics": self._metrics,
            "identity": self._identity,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`; results on other data, or of other metrics, are not comparable and are dropped."""
        if (state["metrics"], state["identity"]) == (self._metrics, self._identity):
            self.evaluated, self.history = state["evaluated"], list(state["history"])


class Checkpointer(Callback):
    """Saves every period, after the last step, when the run is stopped, and after a rollback, so that it is kept.

    Args:
        ends_early: whether the run ends with a step before its last one.
        saved: the state that is on disk.
        evaluated: the last step that was evaluated. An evaluation is worth a checkpoint, too: one that takes most of a
            time limit would else be made again by every process that goes on.
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
        evaluated: Callable[[], int | None] = lambda: None,
        at_start: bool = False,
        tolerant: bool = False,
        ends_early: Due = lambda step: False,
    ) -> None:
        self._save = save
        self._due: Due = lambda step: due(step) or step == num_steps or ends_early(step)
        self._evaluated = evaluated
        self._saved = None if saved is None else self._progress_of(saved)
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
        if self._progress_of(state) != self._saved:
            self._save(state)
            self._saved, self._rollbacks = self._progress_of(state), state.rollbacks

    def _progress_of(self, state: RunState) -> tuple[int, float, int | None]:
        """Changes with every step, with every part of a snapshot, and with an evaluation."""
        return state.step, state.seconds, self._evaluated()


def warn_of_failed_save(error: SaveError) -> None:
    """Says that the run continues all the same."""
    _log.warning("%s; the run continues, as checkpoint.on_error says", error)


def _as_numbers(values: Mapping[str, Tensor | float | None]) -> dict[str, float | None]:
    return {name: float(value) if isinstance(value, Tensor) else value for name, value in values.items()}
