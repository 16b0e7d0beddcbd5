"""Modules that stand for the trackers' packages, and remember what was asked of them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class Shown:
    """What the servers of all trackers hold: the calls that opened runs, and (step, name, value) of each run."""

    opened: list[dict[str, Any]] = field(default_factory=list)
    points: dict[str, list[tuple[int, str, float]]] = field(default_factory=dict)
    finished: list[tuple[str, Any]] = field(default_factory=list)
    parameters: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, run: str, values: Mapping[str, float], step: int) -> None:
        self.points.setdefault(run, []).extend((step, name, value) for name, value in values.items())

    def last(self, run: str) -> int:
        return max((step for step, _, _ in self.points.get(run, [])), default=-1)


def install(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Puts the stubs in place of wandb, mlflow, trackio and torch's writer of event files."""
    shown = Shown()
    modules = {
        "wandb": _wandb(shown),
        "trackio": _trackio(shown),
        "tensorboard": ModuleType("tensorboard"),
        "torch.utils.tensorboard": _tensorboard(shown),
        **_mlflow(shown),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return shown


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    return module


def _wandb(shown: Shown) -> ModuleType:
    class Run:
        def __init__(self, run: str) -> None:
            self.run = run
            self.step = shown.last(run) + 1

        def log(self, values: dict[str, float], *, step: int) -> None:
            assert step >= self.step, "wandb drops these, with a warning for each"
            self.step = step
            earlier = shown.points.get(self.run, [])
            shown.points[self.run] = [point for point in earlier if point[0] != step or point[1] not in values]
            shown.add(self.run, values, step)  # the row of the newest step is open, and takes other values

        def finish(self, *, exit_code: int) -> None:
            shown.finished.append(("wandb", exit_code))

    def init(**options: Any) -> Run:
        shown.opened.append({"tracker": "wandb", **options})
        return Run(f"wandb/{options['id']}")

    return _module("wandb", init=init, Settings=SimpleNamespace)


def _trackio(shown: Shown) -> ModuleType:
    class Run:
        def __init__(self, run: str) -> None:
            self.run = run
            self._next_step = shown.last(run) + 1

        def log(self, values: dict[str, float], *, step: int) -> None:
            self._next_step = max(self._next_step, step + 1)
            shown.add(self.run, values, step)

        def finish(self) -> None:
            shown.finished.append(("trackio", None))

    def init(*, project: str, name: str, config: dict[str, Any], resume: str) -> Run:
        shown.opened.append({"tracker": "trackio", "project": project, "name": name, "config": config})
        assert resume == "allow"
        return Run(f"trackio/{name}")

    return _module("trackio", init=init)


def _mlflow(shown: Shown) -> dict[str, ModuleType]:
    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> Any:
            made = [each for each in shown.opened if each.get("experiment") == name]
            return SimpleNamespace(experiment_id=f"id of {name}") if made else None

        def create_experiment(self, name: str) -> str:
            return f"id of {name}"

        def create_run(self, experiment: str, *, run_name: str) -> Any:
            run = f"mlflow/{sum(each['tracker'] == 'mlflow' for each in shown.opened)}"
            shown.opened.append(
                {"tracker": "mlflow", "experiment": experiment.removeprefix("id of "), "name": run_name}
            )
            return SimpleNamespace(info=SimpleNamespace(run_id=run))

        def update_run(self, run: str, *, status: str) -> None:
            assert run in shown.parameters, "no such run"

        def log_batch(self, run: str, *, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            shown.parameters.setdefault(run, {}).update({each.key: each.value for each in params})
            for each in metrics:
                shown.add(run, {each.key: each.value}, each.step)

        def get_metric_history(self, run: str, name: str) -> list[Any]:
            return [SimpleNamespace(step=step) for step, key, _ in shown.points.get(run, []) if key == name]

        def set_terminated(self, run: str, *, status: str) -> None:
            shown.finished.append(("mlflow", status))

    entities = _module("mlflow.entities", Metric=metric, Param=lambda key, value: SimpleNamespace(key=key, value=value))
    return {"mlflow": _module("mlflow", MlflowClient=MlflowClient, entities=entities), "mlflow.entities": entities}


def _tensorboard(shown: Shown) -> ModuleType:
    class SummaryWriter:
        """Purges as TensorBoard does: all that was written to the folder before, from a step on."""

        def __init__(self, folder: str, *, purge_step: int) -> None:
            self.run = "tensorboard"
            shown.opened.append({"tracker": "tensorboard", "folder": folder, "purge_step": purge_step})
            shown.points[self.run] = [point for point in shown.points.get(self.run, []) if point[0] < purge_step]

        def add_text(self, name: str, text: str, step: int) -> None:
            shown.parameters.setdefault(self.run, {})[name] = text

        def add_scalar(self, name: str, value: float, step: int) -> None:
            shown.add(self.run, {name: value}, step)

        def close(self) -> None:
            shown.finished.append(("tensorboard", None))

    return _module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
