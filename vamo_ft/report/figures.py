"""The numbers of a run that people ask for first."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from vamo_ft.config.monitoring import LOWER_IS_BETTER
from vamo_ft.report.collect import RunRecord
from vamo_ft.report.series import Series

__all__ = ["Fact", "differences", "facts_of", "next_commands"]

_MISSING = "–"
_STUDY = "compare"  # the section that no run takes notice of


@dataclass(frozen=True, slots=True)
class Fact:
    """One figure of a run, as it is shown."""

    name: str
    value: str
    is_number: bool = True


def facts_of(run: RunRecord) -> list[Fact]:
    """Names and figures: what it is, how it ended and what it cost."""
    facts = [
        Fact("state", run.state, is_number=False),
        Fact("method", run.config.get("method.name", _MISSING), is_number=False),
        Fact("model", run.config.get("model.path", _MISSING), is_number=False),
        Fact("steps", _steps(run)),
    ]
    if (loss := run.training.get("loss")) is not None:
        facts.append(Fact("training loss", _decimal(loss.values[-1])))
    for name, series in run.evaluation.items():
        facts.append(Fact(f"{name} at the end", _decimal(series.values[-1])))
        facts.append(Fact(f"best {name}", _best(name, series)))
    if run.model_step is not None and run.model_step != _last_step(run):
        facts.append(Fact("step of the model", f"{run.model_step:,} (best evaluation)"))
    return [
        *facts,
        Fact("forward evaluations", _count(run.last("forward_evals"))),
        Fact("backward evaluations", _count(run.last("backward_evals"))),
        Fact("FLOPs", _MISSING if (flops := run.last("flops")) is None else f"{flops:.3g}"),
        Fact("training time", _duration(run.last("seconds"))),
        Fact("peak memory", _MISSING if (size := run.last("peak_memory_bytes")) is None else f"{size / 1e9:.2f} GB"),
        Fact("resumes", str(sum(mark.kind == "resume" for mark in run.marks))),
        Fact("rollbacks", str(sum(mark.kind == "rollback" for mark in run.marks))),
    ]


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The configuration's keys whose values differ, with the value of each run; the run's own name is none of them."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.name" and key.split(".")[0] != _STUDY)
    rows = [(key, [run.config.get(key, _MISSING) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def next_commands(run: RunRecord) -> list[tuple[str, str]]:
    """What can be done with a run now, and the command for it."""
    path = shlex.quote(run.path)
    if run.state == "running":
        return []
    if run.state == "finished":
        return [
            ("evaluate", f"vamo-ft evaluate {path}"),
            ("export", f"vamo-ft export {path} {shlex.quote(f'{run.name}-model')}"),
        ]
    return [("go on", f"vamo-ft train {shlex.quote(f'{run.path}/config.yaml')}")]


def _steps(run: RunRecord) -> str:
    """How many were made, and of how many where it was to be more."""
    made, planned = _last_step(run), run.config.get("training.steps", "")
    return _count(made) if made is None or planned in ("null", "", f"{made:g}") else f"{_count(made)} of {planned}"


def _last_step(run: RunRecord) -> float | None:
    steps = [series.steps[-1] for group in (run.training, run.evaluation) for series in group.values()]
    return max(steps, default=None)


def _best(name: str, series: Series) -> str:
    """The first of the best values, with its step."""
    if not (finite := series.finite):
        return _MISSING
    better = min if name in LOWER_IS_BETTER else max
    step, value = better(finite, key=lambda pair: pair[1])
    return f"{_decimal(value)} (step {step:g})"


def _decimal(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _count(value: float | None) -> str:
    return _MISSING if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
