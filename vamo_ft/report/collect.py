"""What a run has left in its directory, read as far as it can be: also while it goes on, or after a crash."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vamo_ft.config.compare import leaves
from vamo_ft.config.yaml_text import dotted, parse_yaml, write_yaml_value
from vamo_ft.report.series import Clock, Series

__all__ = ["Mark", "RunRecord", "collect_run", "is_run"]

_RESUME = re.compile(rb"going on from .*step-(\d+)\s*$")
_ROLLBACK = b" (rollback "
_EVALUATION = "eval."
_NOT_SCORES = ("eval.samples", "eval.seconds")

Text = Callable[[str], str]
"""Makes text fit to be shown: no secrets, and nothing that is not printable."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step."""

    step: float
    kind: Literal["resume", "rollback"]
    text: str


@dataclass(slots=True)
class RunRecord:
    """One run, every text of it fit to be shown.

    Attributes:
        name: of its folder.
        path: as the user wrote it.
        state: the one in status.json; `crashed` where that says `running` and nobody holds the folder.
        message: how it ended, where status.json says so.
        time: of the state.
        model_step: of the final model, where status.json says so.
        config: dotted key -> value in YAML.
        environment: dotted key -> value.
        training: name in metrics.jsonl -> its course.
        evaluation: name without `eval.` -> its course.
        clock: what it had spent at each step.
        marks: rollbacks and resumes, by step.
        notes: what a reader should know of the files.
    """

    name: str
    path: str
    state: str = "unknown"
    message: str | None = None
    time: str | None = None
    model_step: int | None = None
    config: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    training: dict[str, Series] = field(default_factory=dict)
    evaluation: dict[str, Series] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def last(self, name: str) -> float | None:
        """The newest value of a training figure, where there is one."""
        series = self.training.get(name)
        return None if series is None or not math.isfinite(series.values[-1]) else series.values[-1]


def is_run(directory: Path) -> bool:
    """Whether a folder holds what a run writes first."""
    return any((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


def collect_run(directory: Path, *, held: bool, text: Text) -> RunRecord:
    """Reads a run directory; what is missing or damaged in it is left out, and noted where it matters.

    Args:
        held: whether a living process trains in it.
        text: applied to every text that is read.

    Raises:
        OSError: the metrics are there and cannot be read.
    """
    run = RunRecord(text(directory.resolve().name), text(str(directory)))
    status = _read_json(directory / "status.json")
    run.state = text(str(status.get("state", "unknown")))
    if run.state == "running" and not held:
        run.state = "crashed"
    for key in ("message", "cause"):
        if isinstance(status.get(key), str):
            run.message = text(status[key])
    run.time = text(str(status["time"])) if "time" in status else None
    if isinstance(step := status.get("model_step"), int):
        run.model_step = step
    if status.get("stopped_early") is True:
        run.notes.append("stopped early, for want of an improvement (evaluation.early_stopping_patience)")
    config = parse_yaml(_read_text(directory / "config.yaml"))
    if isinstance(config.values, Mapping) and not config.problems:
        run.config = {text(dotted(key)): text(write_yaml_value(value)) for key, value in leaves(config.values)}
    else:
        run.notes.append("config.yaml cannot be read")
    environment = leaves(_read_json(directory / "environment.json"))
    run.environment = {text(dotted(key)): text(str(value)) for key, value in environment}
    _read_metrics(run, directory / "metrics.jsonl", text=text)
    run.marks += [Mark(step, "resume", f"resumed from step {step:g}") for step in _resumes(directory / "log.txt")]
    run.marks.sort(key=lambda mark: mark.step)
    if discarded := _num_lines(directory / "metrics.discarded.jsonl"):
        run.notes.append(
            f"{_lines(discarded)} that resumes and rollbacks cut off the metrics: in metrics.discarded.jsonl, not shown"
        )
    return run


def _read_metrics(run: RunRecord, path: Path, *, text: Text) -> None:
    """One line at a time, so that a long file takes no more memory than its numbers do."""
    damaged, misplaced = 0, 0
    for record in _records(path):
        step = None if record is None else _number(record.get("step"))
        if record is None or step is None or not math.isfinite(step):
            damaged += 1
        elif "event" in record:
            if record["event"] == "rollback":
                what = text(f"rollback to step {step:g}: {record.get('message', '')}")
                run.marks.append(Mark(step, "rollback", what))
        elif "loss" not in record and any(key.startswith(_EVALUATION) for key in record):
            misplaced += not _append_evaluation(run, step, record)
        elif step <= run.clock.steps[-1]:
            misplaced += 1
        else:
            _append_training(run, step, record)
    for name in [name for name, series in run.training.items() if name != "loss" and not series.finite]:
        del run.training[name]  # never known, as the gradient's norm where there is no gradient
    for series in (run.training, run.evaluation):
        for name in [name for name in series if text(name) != name]:
            series[text(name)] = series.pop(name)
    if damaged:
        run.notes.append(f"{_lines(damaged)} of metrics.jsonl cannot be read")
    if misplaced:
        run.notes.append(f"{_lines(misplaced)} of metrics.jsonl with no later step than before: left out")


def _append_training(run: RunRecord, step: float, record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        if name == "step" or (number := _number(value)) is None:
            continue
        if (series := run.training.get(name)) is None:
            series = run.training[name] = Series()
        series.append(step, number)
    forward, backward = _number(record.get("forward_evals")), _number(record.get("backward_evals"))
    evaluations, seconds = (forward or 0.0) + 2 * (backward or 0.0), _number(record.get("seconds"))
    last = run.clock
    run.clock.append(
        step,
        evaluations=evaluations if evaluations >= last.evaluations[-1] else last.evaluations[-1],
        seconds=seconds if seconds is not None and seconds >= last.seconds[-1] else last.seconds[-1],
    )


def _append_evaluation(run: RunRecord, step: float, record: Mapping[str, Any]) -> bool:
    """Whether it follows the evaluations before."""
    in_order = True
    for name, value in record.items():
        if name.startswith(_EVALUATION) and name not in _NOT_SCORES and (number := _number(value)) is not None:
            series = run.evaluation.setdefault(name.removeprefix(_EVALUATION), Series())
            if series.steps and series.steps[-1] >= step:
                in_order = False
            else:
                series.append(step, number)
    return in_order


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines; None for one that is damaged. One that is not finished yet is left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
                if line.endswith(b"\n"):
                    yield None
                continue
            yield record if isinstance(record, dict) else None


def _number(value: Any) -> float | None:
    """A number of a record, NaN for the null that stands for what is not finite; None: it is none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _resumes(path: Path) -> list[float]:
    """The steps that the log says the run went on from; after a rollback it says so too, and that is none."""
    steps: list[float] = []
    try:
        with path.open("rb") as file:
            rolled_back = False
            for line in file:
                if _ROLLBACK in line:
                    rolled_back = True
                elif (found := _RESUME.search(line)) is not None:
                    if not rolled_back:
                        steps.append(float(found[1]))
                    rolled_back = False
    except OSError:
        return []
    return steps


def _num_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _lines(count: int) -> str:
    return f"{count:,} {'line' if count == 1 else 'lines'}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
