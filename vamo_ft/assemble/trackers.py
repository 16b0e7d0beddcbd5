"""From `logging.trackers` to clients, once it is known that they can be used."""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vamo_ft.config.load import resolved_values
from vamo_ft.config.monitoring import TrackerName
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.training.tracker_clients import MLflow, RunIds, TensorBoard, TrackedRun, Trackio, WeightsAndBiases
from vamo_ft.training.trackers import Tracker, Trackers

__all__ = ["build_trackers"]

_EXTRAS: dict[TrackerName, str] = {"tensorboard": "tracking"}  # where it is not named like the tracker
_PROJECTS: dict[TrackerName, str] = {
    "wandb": "WANDB_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "trackio": "TRACKIO_PROJECT",
}
_PROJECT = "vamo-ft"
_SERVERS: dict[TrackerName, tuple[str, ...]] = {
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "trackio": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"),
}
_LOCAL = ("file:", "sqlite:", "/", ".")


def build_trackers(config: RunConfig, root: Path, *, mask: Callable[[str], str]) -> Trackers:
    """The configured trackers; none of them is opened yet.

    Args:
        root: the run's directory.
        mask: takes secrets out of what they are told of the configuration.

    Raises:
        UsageError: a package is not installed, or a tracker would use the network in an offline run.
    """
    for name in config.logging.trackers:
        _check_installed(name)
        if config.run.offline:
            _check_offline(name)
    values = {key: _masked(value, mask) for key, value in resolved_values(config).items()}
    ids = RunIds(root / "trackers.json")

    def build(name: TrackerName) -> Tracker:
        project = config.logging.project or os.environ.get(_PROJECTS.get(name, ""), "") or _PROJECT
        run = TrackedRun(name=config.run.name, project=project, root=root, config=values, ids=ids)
        match name:
            case "tensorboard":
                return TensorBoard(run)
            case "wandb":
                return WeightsAndBiases(run, offline=config.run.offline)
            case "mlflow":
                return MLflow(run)
            case "trackio":
                return Trackio(run)

    return Trackers([build(name) for name in config.logging.trackers])


def _check_installed(name: TrackerName) -> None:
    if name not in sys.modules and find_spec(name) is None:
        raise UsageError(
            f"logging.trackers: {name} is not installed; pip install 'vamo-ft[{_EXTRAS.get(name, name)}]', or leave it "
            "out"
        )


def _check_offline(name: TrackerName) -> None:
    for variable in _SERVERS.get(name, ()):
        address = os.environ.get(variable, "")
        if address and not address.startswith(_LOCAL):
            raise UsageError(
                f"run.offline: {variable} names a server, which logging.trackers: {name} would call; unset it, or "
                "leave the tracker out"
            )


def _masked(value: Any, mask: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mask(value)
    return [_masked(item, mask) for item in value] if isinstance(value, list) else value
