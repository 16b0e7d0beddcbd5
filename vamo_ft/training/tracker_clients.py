"""The clients of TensorBoard, Weights & Biases, MLflow and Trackio (implement `Tracker`).

Each keeps the id of its run in `trackers.json` in the run directory, so that a run that is resumed goes on in the same
one. A client's package is imported when its run is opened, in the tracker's own thread.
"""

import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vamo_ft.training.rundir import read_json, write_json

__all__ = ["MLflow", "RunIds", "TensorBoard", "TrackedRun", "Trackio", "WeightsAndBiases"]

_PARAMETERS_AT_ONCE = 100  # more are refused by MLflow
_LONGEST_PARAMETER = 500  # what every version of it takes
_KILLED = (75, 130)


class RunIds:
    """The ids of a run in each tracker, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def get(self, tracker: str) -> str | None:
        """The id, where there is one."""
        found = read_json(self._path).get(tracker)
        return found if isinstance(found, str) else None

    def set(self, tracker: str, value: str) -> str:
        """Keeps an id, and returns it."""
        with self._lock:
            write_json(self._path, {**read_json(self._path), tracker: value})
        return value


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        name: of the run.
        project: or experiment, in which it is shown.
        root: its directory.
        config: dotted key -> value, without secrets.
        ids: of earlier processes of the run.
    """

    name: str
    project: str
    root: Path
    config: Mapping[str, Any]
    ids: RunIds

    def id_for(self, tracker: str, step: int | None) -> str:
        """The id that the run has there; a new one where it begins anew, or has none."""
        known = None if step is None else self.ids.get(tracker)
        return known or self.ids.set(tracker, uuid.uuid4().hex[:8])


class TensorBoard:
    """Event files in `<run directory>/tensorboard`; what a resume makes obsolete is purged."""

    name = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._writer: Any = None

    def go_on(self, step: int | None) -> None:
        """Has the steps after `step` taken for obsolete, so that they are shown once."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        purge_step = 0 if step is None else step + 1
        self._writer = SummaryWriter(str(self._run.root / "tensorboard"), purge_step=purge_step)
        lines = "".join(f"    {key}: {value}\n" for key, value in self._run.config.items())
        self._writer.add_text("config", lines, step or 0)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """One scalar for each figure."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, *, exit_code: int) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run with the same id at every resume. Its steps only ascend: those that it has are not logged again.

    Neither the terminal's output nor source code is uploaded.

    Args:
        offline: write to `<run directory>/wandb` only, for `wandb sync`.
    """

    name = "wandb"

    def __init__(self, run: TrackedRun, *, offline: bool) -> None:
        self._run = run
        self._offline = offline
        self._opened: Any = None

    def go_on(self, step: int | None) -> int | None:
        """Opens the run once; goes back in it as far as it can, which is not at all."""
        import wandb

        if self._opened is None:
            self._opened = wandb.init(
                project=self._run.project,
                name=self._run.name,
                id=self._run.id_for(self.name, step),
                resume="allow",
                dir=str(self._run.root),
                config=dict(self._run.config),
                allow_val_change=True,
                mode="offline" if self._offline else None,
                settings=wandb.Settings(console="off", disable_code=True, login_timeout=30),
            )
        return int(self._opened.step) - 1  # the step that it would take next, or is still taking figures for

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """All figures at once."""
        self._opened.log(dict(values), step=step)

    def finish(self, *, exit_code: int) -> None:
        """Uploads what is left."""
        self._opened.finish(exit_code=exit_code)


class MLflow:
    """A run on the server, or in the folder, that MLFLOW_TRACKING_URI names. What a figure's history has stays."""

    name = "mlflow"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._client: Any = None
        self._run_id = ""
        self._resumed = False
        self._shown: dict[str, int] = {}

    def go_on(self, step: int | None) -> None:
        """Opens the run by its id, or makes one, with the configuration as its parameters."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._shown = {}
        known = None if step is None else self._run.ids.get(self.name)
        self._resumed = known is not None
        if known is not None:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(self._run.project)
        number = self._client.create_experiment(self._run.project) if experiment is None else experiment.experiment_id
        self._run_id = self._client.create_run(number, run_name=self._run.name).info.run_id
        self._run.ids.set(self.name, self._run_id)
        self._log_parameters()

    def _log_parameters(self) -> None:
        from mlflow.entities import Param

        config = self._run.config
        parameters = [Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in config.items()]
        for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run_id, params=parameters[start : start + _PARAMETERS_AT_ONCE])

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """All figures at once, but for those whose history reaches this step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items() if step > self._last(name)]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def _last(self, name: str) -> int:
        """The last step that a figure had when the run was resumed; asked for once."""
        if not self._resumed:
            return -1
        if name not in self._shown:
            history = self._client.get_metric_history(self._run_id, name)
            self._shown[name] = max((metric.step for metric in history), default=-1)
        return self._shown[name]

    def finish(self, *, exit_code: int) -> None:
        """Marks the run as finished, killed or failed."""
        status = "FINISHED" if exit_code == 0 else "KILLED" if exit_code in _KILLED else "FAILED"
        self._client.set_terminated(self._run_id, status=status)


class Trackio:
    """A run with a name of its own, `<run>-<id>`, by which it is found again. What it has stays."""

    name = "trackio"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._opened: Any = None

    def go_on(self, step: int | None) -> int | None:
        """Opens the run once."""
        import trackio

        if self._opened is None:
            self._opened = trackio.init(
                project=self._run.project,
                name=f"{self._run.name}-{self._run.id_for(self.name, step)}",
                config=dict(self._run.config),
                resume="allow",
            )
        following = getattr(self._opened, "_next_step", None)  # the client has no public word for it
        return following - 1 if isinstance(following, int) else None

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """All figures at once."""
        self._opened.log(dict(values), step=step)

    def finish(self, *, exit_code: int) -> None:
        """Writes what is left."""
        self._opened.finish()
