"""Trains a run to its end, over divergences where it may."""

import gc
import logging
from collections.abc import Callable

from vamo_ft.assemble.divergence import explained
from vamo_ft.assemble.run import Run, build_run
from vamo_ft.assemble.surroundings import RunSurroundings
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DivergenceError
from vamo_ft.core.protocols import Runtime
from vamo_ft.data.mixture import Origin
from vamo_ft.training.checkpoint import Checkpoint, newest_checkpoint
from vamo_ft.training.shared_saving import newest_together
from vamo_ft.training.state import RunState

__all__ = ["train_run"]

_log = logging.getLogger("vamo_ft")

_FACTOR = 0.5


def train_run(
    config: RunConfig,
    surroundings: RunSurroundings,
    *,
    checkpoint: Checkpoint | None,
    announce: Callable[[Run, Checkpoint | None], None],
    allow_changes: bool = False,
) -> Run:
    """Builds the run, restores `checkpoint` where there is one, and trains to the end.

    With `training.on_divergence: rollback` a run that diverges is built anew from its newest intact checkpoint, as a
    resumed one is. The step that diverged is then left out, and the learning rate is half of what it was. All of that
    stands in the run's state, which is saved before training goes on; a run that is killed before that diverges and
    goes back again, to the same bits.

    Args:
        announce: called when a run is built and about to train.
        allow_changes: go on from checkpoints of other settings, as `build_run` does.

    Raises:
        DivergenceError: the run diverged and may not, or cannot, go on; names the samples and the last checkpoint.
        VamoFtError: as `build_run` and `Trainer.train` do.
    """
    run = build_run(config, surroundings, checkpoint=checkpoint, allow_changes=allow_changes)
    while True:
        announce(run, checkpoint)
        if (error := _train(run)) is None:
            return run
        diverged, origin, runtime = run.trainer.state, run.origin, run.runtime
        del run  # its memory is needed for its successor
        gc.collect()  # a model may stand in a cycle of references
        checkpoint = _way_back(config, surroundings, error, diverged, origin, runtime)
        run = build_run(config, surroundings, checkpoint=checkpoint, allow_changes=allow_changes)
        state = run.trainer.state
        state.roll_back(diverged, step=error.step, factor=_FACTOR)
        advice = (
            f"going back to it with {state.learning_rate_scale:g} of the learning rate (rollback {state.rollbacks} of "
            f"{config.training.rollbacks})"
        )
        _log.warning("%s", explained(error, config, origin=origin, checkpoint=checkpoint.path, advice=advice))
        surroundings.writer.write(
            {
                "step": state.step,
                "event": "rollback",
                "message": str(error),
                "diverged_step": diverged.step + 1,
                "skipped": error.step is not None,
                "samples": list(error.samples),
                "rollbacks": state.rollbacks,
                "learning_rate_scale": state.learning_rate_scale,
            }
        )


def _train(run: Run) -> DivergenceError | None:
    """The divergence that ended the training; without the frames, which would keep the model alive."""
    try:
        run.trainer.train()
    except DivergenceError as error:
        return DivergenceError(str(error), step=error.step, samples=error.samples)
    return None


def _way_back(
    config: RunConfig,
    surroundings: RunSurroundings,
    error: DivergenceError,
    diverged: RunState,
    origin: Callable[[int], Origin],
    runtime: Runtime,
) -> Checkpoint:
    """The checkpoint to go back to, for all processes; raises the error, explained, where there is no use in it."""
    may, root = config.training.on_divergence == "rollback", surroundings.checkpoints
    checkpoint = newest_together(runtime, root) if may else newest_checkpoint(root)
    path, anew = None if checkpoint is None else checkpoint.path, "start anew with --fresh and a lower learning rate"
    if not may:
        advice = f"{anew} (optimizer.learning_rate), or go on with training.on_divergence: rollback"
        raise explained(error, config, origin=origin, checkpoint=path, advice=advice)
    if diverged.rollbacks >= config.training.rollbacks:
        advice = f"{diverged.rollbacks} rollbacks were made, no more are allowed (training.rollbacks); {anew}"
        raise explained(error, config, origin=origin, checkpoint=path, advice=advice)
    if checkpoint is None or (error.step is None and checkpoint.step == diverged.step):
        advice = f"a rollback would come to the same; look at the data, or {anew}"
        raise explained(error, config, origin=origin, checkpoint=path, advice=advice)
    return checkpoint
