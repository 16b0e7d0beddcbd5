"""What a run leaves behind when it is done: the final model, a summary, and a page."""

import logging
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vamo_ft.assemble import Run, build_card
from vamo_ft.commands.console import patient_console
from vamo_ft.config.monitoring import LOWER_IS_BETTER
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.training.best import best_model
from vamo_ft.training.checkpoint import checkpoint_path, open_checkpoint
from vamo_ft.training.ledger import peak_memory_bytes
from vamo_ft.training.rundir import RunDirectory, sync, sync_folder

__all__ = ["Finished", "print_summary", "save_final_model", "way_on", "write_run_report"]

_log = logging.getLogger("vamo_ft")


@dataclass(frozen=True, slots=True)
class Finished:
    """A run at its end.

    Attributes:
        saved: the step of the final model, and what was measured there.
        stopped_early: whether for want of an improvement.
    """

    run: Run
    saved: Mapping[str, Any]
    stopped_early: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What status.json says of it."""
        step = self.run.trainer.state.step
        return {"step": step, "stopped_early": self.stopped_early, "model_step": self.saved["step"]}


def save_final_model(run: Run, config: RunConfig, directory: RunDirectory) -> Mapping[str, Any]:
    """Writes the model aside and puts it in place of an older one: that of the last step, or of the best evaluation.

    Returns:
        The step that it is of, and what was measured there.
    """
    step, evaluator, folder = run.trainer.state.step, run.evaluator, None
    saved: Mapping[str, Any] = {"step": step} if evaluator is None else evaluator.history[-1]
    if evaluator is not None and evaluator.ranking is not None and config.evaluation.load_best_model_at_end:
        best = best_model(evaluator.ranking, evaluator.history, checkpoints=directory.checkpoints, step=step)
        if best is not None:
            saved, folder = best
            _log.info("the final model is that of step %d, the best %s", saved["step"], evaluator.ranking.metric)
    if folder is None and run.parameters.sharded:  # no process has the whole, but that of the last step is saved
        folder = _saved_model(directory, step)
    aside = directory.model.with_name(".model.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        run.save_model(aside, card=build_card(config, run=directory.root, step=saved["step"]), saved=folder)
        sync_folder(aside)  # before status.json says that the run is finished
        directory.check_held()
        shutil.rmtree(directory.model, ignore_errors=True)
        aside.rename(directory.model)
        sync(directory.root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return saved


def _saved_model(directory: RunDirectory, step: int) -> Path:
    try:
        return open_checkpoint(checkpoint_path(directory.checkpoints, step)).model_dir
    except DataError as error:  # checkpoint.on_error: continue went over it
        raise SaveError(
            f"{directory.model}: was not written: with training.fsdp it is the model of the last checkpoint, which is "
            f"not there ({error}); make room, and run again to go on from the one before"
        ) from error


def print_summary(finished: Finished, directory: RunDirectory) -> None:
    """Before and after, the best step, the cost, and the next command."""
    run, saved = finished.run, finished.saved
    state = run.trainer.state
    console = patient_console(sys.stdout)
    if run.evaluator is not None:
        history = run.evaluator.history
        table = Table("evaluation", "before", "after", "best", "at step", title=escape(str(directory.root)))
        for name in (key for key in history[-1] if key != "step"):
            better = min if name.removeprefix("eval.") in LOWER_IS_BETTER else max
            best = better(history, key=lambda line: line[name])
            figures = [f"{line[name]:.4f}" for line in (history[0], history[-1], best)]
            table.add_row(name.removeprefix("eval."), *figures, str(best["step"]))
        console.print(table)
    console.print(
        f"{state.step} steps in {state.seconds:.0f} s; {state.work.forward_samples} forward and "
        f"{state.work.backward_samples} backward sample evaluations; peak memory {peak_memory_bytes() / 1e9:.2f} GB",
        soft_wrap=True,
    )
    of_step = "" if saved["step"] == state.step else f" (of step {saved['step']}, the best evaluation)"
    console.print(f"model: {directory.model}{of_step}", soft_wrap=True, markup=False)
    root = shlex.quote(str(directory.root))
    following = f"export {root} {shlex.quote(f'{directory.root.name}-model')}"
    if run.evaluator is not None:
        following = f"evaluate {root}"
    console.print(f"next:  vamo-ft {following}", soft_wrap=True, markup=False)


def write_run_report(directory: RunDirectory) -> None:
    """Writes the page of a finished run; without it, the run is finished all the same."""
    try:
        from vamo_ft.commands.report import write_report  # loads what draws, which nothing before needs

        write_report([directory.root], out=directory.report)
    except Exception as error:
        _log.warning("%s: cannot be written (%s: %s)", directory.report, type(error).__name__, error)
    else:
        print(f"report: {directory.report}")


def way_on(directory: RunDirectory) -> str:
    """How a run goes on that did not come to its end."""
    name = directory.root.name
    return (
        f"to go on, train {name} again with the same settings (after --fresh: with --set run.name={name} in its place)"
    )
