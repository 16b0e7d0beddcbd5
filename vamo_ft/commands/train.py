"""`vamo-ft train`: from a configuration file to a finished run, or on from where it stopped."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vamo_ft.assemble import Run, RunSurroundings, build_trackers, train_run
from vamo_ft.commands.assist import Part, assist
from vamo_ft.commands.console import logging_to, patient_console
from vamo_ft.commands.finish import Finished, print_summary, save_final_model, way_on, write_run_report
from vamo_ft.commands.secrets import masked
from vamo_ft.commands.validate import config_warnings
from vamo_ft.config.load import dump_config
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DataError, DriftError, ProcessLostError, StopRequested, UsageError, VamoFtError
from vamo_ft.training.checkpoint import Checkpoint, checkpoint_folders, newest_checkpoint, open_checkpoint
from vamo_ft.training.disk import full_disk_explained
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.rundir import RunDirectory, environment, unused, write_json, write_text
from vamo_ft.training.runtime import connected, memory_errors_explained
from vamo_ft.training.signals import StopSignals
from vamo_ft.training.sinks import MetricsWriter
from vamo_ft.training.state import RunState
from vamo_ft.training.trackers import Trackers

__all__ = ["train", "train_quietly"]

_log = logging.getLogger("vamo_ft")

_SECONDS_BETWEEN_LOOKS = 1.0


def train(
    load: Callable[[], RunConfig],
    *,
    resume: str,
    fresh: bool,
    allow_changes: bool = False,
    use_cache: bool = True,
    ends_process: bool = False,
) -> None:
    """Trains, or goes on with the run directory's newest intact checkpoint.

    Of several processes that a launcher started, the main one does so, and the others take their part of the passes.

    Args:
        load: gives the configuration.
        resume: auto (go on where there is something to go on from), never (refuse to), or a checkpoint's folder.
        fresh: take another name, `<name>-2` and so on, if the first one's directory exists.
        allow_changes: go on from a checkpoint's folder with settings, data or a base model that differ from its own.
        use_cache: keep tokens, and take them from where they were kept.
        ends_process: nothing follows in this process.

    Raises:
        ConfigError: there is something wrong with the configuration.
        VamoFtError: the run could not be started or finished; `exit_code` says how it ended.
        SystemExit: the same in a process that is not the main one.
    """
    with connected() as processes:
        config = load()
        signals = StopSignals(max_seconds=config.training.max_seconds, last=ends_process)
        part = Part(processes)
        if part.is_main:
            _lead(
                config,
                part,
                signals=signals,
                resume=resume,
                fresh=fresh,
                allow_changes=allow_changes,
                use_cache=use_cache,
            )
        else:
            assist(config, part, signals=signals)


def _lead(
    config: RunConfig,
    part: Part,
    *,
    signals: StopSignals,
    resume: str,
    fresh: bool,
    allow_changes: bool,
    use_cache: bool,
) -> None:
    if allow_changes and resume in ("auto", "never"):
        raise UsageError("--allow-changes: needs --resume PATH, which names the checkpoint to continue from")
    if fresh:
        config = _with_new_name(config)
    directory = RunDirectory(Path(config.run.output_dir) / config.run.name)
    trackers = build_trackers(config, directory.root, mask=masked)
    taken_over = directory.lock()
    try:
        _train_or_resume(
            config,
            directory,
            trackers,
            part,
            resume=resume,
            taken_over=taken_over,
            signals=signals,
            allow_changes=allow_changes,
            use_cache=use_cache,
        )
    finally:
        directory.unlock()


def _train_or_resume(
    config: RunConfig,
    directory: RunDirectory,
    trackers: Trackers,
    part: Part,
    *,
    resume: str,
    taken_over: str | None,
    signals: StopSignals,
    allow_changes: bool,
    use_cache: bool,
) -> None:
    with _write_errors_explained(directory):
        if resume == "auto" and _is_finished(directory, config):
            if config.logging.report and not directory.report.exists():  # the process ended before it was written
                write_run_report(directory)
            print(f"{directory.root}: this run is finished; its model is in {directory.model}")
            part.begin(config, directory, None, finished=True)
            return
        console = patient_console(sys.stderr)
        with logging_to(console, file=directory.log), signals, trackers:
            with _status_of(directory, signals) as outcome, part.reasons_told():
                if taken_over is not None:
                    _log.warning("%s: taken over from %s", directory.root, taken_over)
                for warning in config_warnings(config):
                    _log.warning("%s", warning)
                checkpoint = _starting_point(directory, resume)
                part.begin(config, directory, checkpoint, allow_changes=allow_changes, use_cache=use_cache)
                finished = _train(
                    config,
                    directory,
                    checkpoint,
                    trackers,
                    console=console,
                    signals=signals,
                    allow_changes=allow_changes,
                    use_cache=use_cache,
                )
                outcome |= finished.facts
                print_summary(finished, directory)
            if config.logging.report:
                write_run_report(directory)


def train_quietly(
    config: RunConfig, *, console: Console, signals: StopSignals, seconds: float | None, use_cache: bool = True
) -> bool:
    """Trains one run of several, or goes on with it; shows progress and warnings alone.

    Args:
        signals: entered by the caller.
        seconds: of training after which the run stops as on a signal; None: no limit.
        use_cache: keep tokens, and take them from where they were kept.

    Returns:
        Whether it came to its end, now or before; False where `seconds` stopped it.

    Raises:
        StopRequested: a signal came.
        VamoFtError: as `train`.
    """
    directory = RunDirectory(Path(config.run.output_dir) / config.run.name)
    trackers = build_trackers(config, directory.root, mask=masked)
    clock = _TrainingClock(seconds)
    directory.lock()
    try:
        with _write_errors_explained(directory):
            if _is_finished(directory, config):
                return True
            quiet = logging_to(console, file=directory.log, quiet=True)
            with quiet, trackers, _status_of(directory, signals) as outcome:
                checkpoint = _starting_point(directory, "auto")
                finished = _train(
                    config,
                    directory,
                    checkpoint,
                    trackers,
                    console=console,
                    signals=signals,
                    use_cache=use_cache,
                    clock=clock,
                )
                outcome |= finished.facts
    except StopRequested:
        if signals.cause is not None:
            raise
        return False
    finally:
        directory.unlock()
    return True


@dataclass(slots=True)
class _TrainingClock:
    """Whether a run has trained for long enough, by its own count of seconds."""

    limit: float | None = None
    state: RunState | None = None

    def is_over(self) -> bool:
        return self.limit is not None and self.state is not None and self.state.seconds >= self.limit


@contextmanager
def _write_errors_explained(directory: RunDirectory) -> Iterator[None]:
    """Turns a file of the run directory that cannot be written or replaced in the block into one line with its name."""
    root = directory.root.absolute()
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename  # a rename names its target second
        if not isinstance(name, str) or not Path(name).absolute().is_relative_to(root):
            raise
        raise UsageError(
            f"run.output_dir: {name} cannot be written ({error.strerror}); mend it, or choose another run.name"
        ) from error


def _train(
    config: RunConfig,
    directory: RunDirectory,
    checkpoint: Checkpoint | None,
    trackers: Trackers,
    *,
    console: Console,
    signals: StopSignals,
    allow_changes: bool = False,
    use_cache: bool = True,
    clock: _TrainingClock | None = None,
) -> Finished:
    """Trains from `checkpoint`, or from the start, and saves the final model."""
    clock = _TrainingClock() if clock is None else clock
    metrics = MetricsWriter(directory.metrics, listeners=[trackers.write], check_held=directory.check_held)
    stop_requested = _stop_requested(directory, signals, clock)
    with metrics as writer:
        if checkpoint is None:
            writer.truncate_to(0)  # lines of an attempt that ended before its first checkpoint
        surroundings = RunSurroundings(
            checkpoints=directory.checkpoints,
            seed_log=directory.seed_log,
            writer=writer,
            use_cache=use_cache,
            progress=ConsoleProgress(console),
            stop_requested=stop_requested,
            check_held=directory.check_held,
        )

        def announce(run: Run, start: Checkpoint | None) -> None:
            directory.check_held()
            clock.state = run.trainer.state
            write_text(directory.config, dump_config(config))
            write_json(directory.environment, environment(run.device_name))
            if start is not None:
                _log.info("going on from %s", start.path)
            _log.info(
                "%s: %s trainable of %s parameters, %d training samples, %d steps",
                config.method.name,
                f"{run.parameters.numel:,}",
                f"{run.loaded.numel:,}",
                run.trainer.source.num_samples,
                run.trainer.num_steps,
            )
            trackers.go_on(None if start is None else run.trainer.state.step)

        run = train_run(config, surroundings, checkpoint=checkpoint, announce=announce, allow_changes=allow_changes)
    step = run.trainer.state.step
    if early := run.evaluator is not None and run.evaluator.gives_up(step):
        _log.info(
            "stopped early at step %d: no improvement in %d evaluations (evaluation.early_stopping_patience)",
            step,
            config.evaluation.early_stopping_patience,
        )
    with memory_errors_explained("saving the final model"):
        saved = save_final_model(run, config, directory)
    return Finished(run, saved, early)


def _stop_requested(directory: RunDirectory, signals: StopSignals, clock: _TrainingClock) -> Callable[[], bool]:
    """Whether a signal came or the time is over; looks once a second whether the directory is still this process's."""
    looked = time.monotonic()

    def requested() -> bool:
        nonlocal looked
        if time.monotonic() - looked >= _SECONDS_BETWEEN_LOOKS:
            looked = time.monotonic()
            directory.check_held()
        return signals.requested() or clock.is_over()

    return requested


def _with_new_name(config: RunConfig) -> RunConfig:
    """The configuration under the first of `name`, `name-2`, `name-3` ... that has no directory yet."""
    name = unused(Path(config.run.output_dir) / config.run.name).name
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def _is_finished(directory: RunDirectory, config: RunConfig) -> bool:
    if directory.read_status().get("state") != "finished" or not directory.config.is_file():
        return False
    if not directory.model.is_dir():  # somebody removed it: it is written again from the last checkpoint
        return False
    written: str = directory.config.read_text(encoding="utf-8", errors="replace")
    return written == dump_config(config)


def _starting_point(directory: RunDirectory, resume: str) -> Checkpoint | None:
    if resume not in ("auto", "never"):
        if Path(resume).resolve().parent != directory.checkpoints.resolve():
            raise UsageError(f"--resume {resume}: not a checkpoint of this run; they are in {directory.checkpoints}")
        return open_checkpoint(Path(resume))
    newest = newest_checkpoint(directory.checkpoints)
    if newest is not None and resume == "never":
        raise UsageError(
            f"{directory.root} holds checkpoints, and --resume never would lose them; use --fresh for a new directory"
        )
    if newest is None and directory.checkpoints.is_dir() and any(directory.checkpoints.glob("step-*")):
        raise DataError(
            f"{directory.checkpoints}: no checkpoint is intact (see {directory.log}); put one back, or start anew with "
            "--fresh"
        )
    return newest


@contextmanager
def _status_of(directory: RunDirectory, signals: StopSignals) -> Iterator[dict[str, Any]]:
    """Keeps status.json true, whatever happens in the block, and says what to do next.

    Yields:
        What status.json says besides once the block is done; to be filled.
    """
    outcome: dict[str, Any] = {}
    directory.write_status("running")
    try:
        with (
            memory_errors_explained("the preparation of the run"),
            _write_errors_explained(directory),
            full_disk_explained(directory.root),
        ):
            yield outcome
    except StopRequested as error:
        cause = signals.cause or "a signal to another process"
        directory.write_status("stopped", exit_code=error.exit_code, facts={"cause": cause})
        cause = "the time limit (training.max_seconds)" if cause == "time limit" else cause
        raise StopRequested(f"{error} by {cause}; {way_on(directory)}") from None
    except (ProcessLostError, DriftError) as error:
        last = "".join(f"; its last checkpoint is {path}" for path in checkpoint_folders(directory.checkpoints)[:1])
        message = f"{error}{last}; {way_on(directory)}"
        directory.write_status("failed", exit_code=error.exit_code, facts={"message": masked(message)})
        raise type(error)(message) from None
    except VamoFtError as error:
        state = {3: "diverged", 4: "out_of_memory"}.get(error.exit_code, "failed")
        directory.write_status(state, exit_code=error.exit_code, facts={"message": masked(str(error))})
        raise
    except BaseException as error:
        directory.write_status("failed", exit_code=1, facts={"message": masked(f"{type(error).__name__}: {error}")})
        raise
    else:
        directory.write_status("finished", exit_code=0, facts=outcome)
