"""`vamo-ft compare`: several methods on the same data at equal compute, each with a learning rate of its own."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vamo_ft.assemble import Surroundings
from vamo_ft.commands.console import logging_to
from vamo_ft.commands.train import train_quietly
from vamo_ft.config.errors import ConfigError
from vamo_ft.config.load import LoadedConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import StopRequested, UsageError
from vamo_ft.report.comparison import Bar, Cost, draw_comparison, markdown_table
from vamo_ft.report.curves import Curve
from vamo_ft.studies.compare import Comparison
from vamo_ft.studies.intervals import Interval
from vamo_ft.studies.outcome import MethodOutcome, Outcome
from vamo_ft.studies.records import RunRecord
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.rundir import RunDirectory, unused, write_text
from vamo_ft.training.runtime import memory_errors_explained, refuse_launchers
from vamo_ft.training.signals import StopSignals

__all__ = ["compare"]

_WIDTH = 160

_SPENT = {
    "evaluations": "sample evaluations, forward + 2 x backward",
    "tokens": "tokens, forward + 2 x backward",
    "flops": "FLOPs",
    "seconds": "seconds of training",
}


def compare(
    loaded: LoadedConfig, *, out: Path | None, fresh: bool, use_cache: bool = True, ends_process: bool = False
) -> None:
    """Runs the comparison, or goes on with it; prints the table and writes `compare.{json,md,png}`.

    Args:
        loaded: the configuration, with its `compare` section.
        out: folder of everything; None: `<output_dir>/<run name>-compare`.
        fresh: take another folder, `<out>-2` and so on, if the first one exists.
        use_cache: keep tokens, and take them from where they were kept.
        ends_process: nothing follows in this process.

    Raises:
        ConfigError: no methods are named.
        VamoFtError: the comparison could not be started or finished; `exit_code` says how it ended.
    """
    refuse_launchers()
    config = loaded.config
    if config.compare is None:
        raise ConfigError(["compare: names no methods; add --methods vamo,mezo, or a section (see the README)"])
    folder = Path(config.run.output_dir) / f"{config.run.name}-compare" if out is None else out
    if folder.is_file():
        raise UsageError(f"{folder}: is a file; name a folder with --out")
    again = "give the same command again"
    if fresh:
        folder = unused(folder)
        again += f", with --out {shlex.quote(str(folder))} in place of --fresh"
    directory = RunDirectory(folder)
    directory.lock()
    try:
        with StopSignals(max_seconds=config.training.max_seconds, last=ends_process) as signals:
            outcome, runs = _run(loaded, config, folder, signals, use_cache=use_cache)
    except StopRequested as error:
        cause = "the time limit (training.max_seconds)" if signals.cause == "time limit" else signals.cause
        raise StopRequested(f"stopped by {cause}; to go on, {again}") from error
    finally:
        directory.unlock()
    _write(outcome, runs, folder)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    _print(console, outcome)
    written = ", ".join(str(folder / f"compare.{suffix}") for suffix in ("md", "png", "json"))
    console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)


def _run(
    loaded: LoadedConfig, config: RunConfig, folder: Path, signals: StopSignals, *, use_cache: bool
) -> tuple[Outcome, list[RunRecord]]:
    console = Console(stderr=True)

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    comparison = Comparison(
        config=config,
        arms=loaded.arms,
        folder=folder,
        execute=lambda run, *, seconds: train_quietly(
            run, console=console, signals=signals, seconds=seconds, use_cache=use_cache
        ),
        surroundings=Surroundings(
            progress=ConsoleProgress(console), stop_requested=signals.requested, use_cache=use_cache
        ),
        tell=tell,
    )
    if config.evaluation.ranked_by is not None:
        tell(
            "evaluation: keys on the best model and on early stopping are left out; each run spends its budget, and "
            "its last model counts"
        )
    with logging_to(console, quiet=True), memory_errors_explained("a run of the comparison"):
        return comparison.run(), comparison.reported


def _write(outcome: Outcome, runs: Sequence[RunRecord], folder: Path) -> None:
    columns, rows = _table(outcome)
    text = "\n\n".join(
        [_title(outcome), markdown_table(columns, rows), "\n".join(f"- {note}" for note in _notes(outcome))]
    )
    try:
        write_text(folder / "compare.md", text + "\n")
        draw_comparison(
            folder / "compare.png",
            curves={
                name: [_curve(method.label, name, runs) for method in outcome.methods]
                for name in dict.fromkeys(["loss", outcome.metric])
            },
            spent=_SPENT[outcome.currency],
            metric=outcome.metric,
            bars=[
                Bar(method.label, method.median, None if method.mean is None else (method.mean.low, method.mean.high))
                for method in outcome.methods
            ],
            costs=[
                Cost(method.label, method.step_seconds, method.peak_memory_bytes / 1e9) for method in outcome.methods
            ],
        )
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); mend it, and run again") from None


def _curve(label: str, name: str, runs: Sequence[RunRecord]) -> Curve:
    """Mean, least and largest value over seeds at each evaluation, as far as every seed came."""
    of_method = [run for run in runs if run.label == label]
    points = [
        (fmean(point.spent for point in group), [value for point in group if (value := point.values[name]) is not None])
        for group in zip(*(run.points for run in of_method), strict=False)
    ]
    known = [(x, values) for x, values in points if len(values) == len(of_method)]
    return Curve(
        label,
        [x for x, _ in known],
        [fmean(values) for _, values in known],
        [min(values) for _, values in known],
        [max(values) for _, values in known],
    )


def _print(console: Console, outcome: Outcome) -> None:
    columns, rows = _table(outcome)
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(f"\n{_title(outcome)}", highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(table)
    console.print()
    for note in _notes(outcome):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _title(outcome: Outcome) -> str:
    return (
        f"{outcome.metric} after {outcome.budget:.6g} {outcome.currency}, {len(outcome.seeds)} seeds, "
        f"{outcome.num_samples} held-out samples"
    )


def _table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    columns = [
        "method",
        "learning rate",
        "steps",
        f"median {outcome.metric}",
        *([] if outcome.metric == "loss" else ["median loss"]),
        "mean (95 %)",
        f"against {outcome.reference} (95 %)",
        "verdict",
        "spent",
        "s/step",
        "memory",
    ]
    return columns, [_row(method, outcome) for method in outcome.methods]


def _row(method: MethodOutcome, outcome: Outcome) -> list[str]:
    contest = method.contest
    if method.label == outcome.reference:
        verdict = "reference"
    elif contest is None:
        verdict = "-"
    else:
        verdict = f"{contest.verdict} (p {contest.adjusted_p:.3f})"
    diverged = f"diverged ({method.diverged} of {len(method.values)})" if method.diverged else ""
    return [
        method.label,
        f"{method.learning_rate:g}{' (edge)' if method.at_edge else ''}",
        f"{method.steps:,}",
        diverged if method.median is None else f"{method.median:.4f}",
        *([] if outcome.metric == "loss" else ["" if method.median_loss is None else f"{method.median_loss:.4f}"]),
        diverged if method.mean is None else _interval(method.mean),
        "" if contest is None else _interval(contest.difference, sign="+"),
        verdict,
        f"{method.spent:,.4g}" if method.spent >= 1e6 else f"{method.spent:,.0f}",
        "-" if method.step_seconds is None else f"{method.step_seconds:.3g}",
        f"{method.peak_memory_bytes / 1e9:.2f} GB",
    ]


def _interval(interval: Interval, *, sign: str = "") -> str:
    return f"{interval.value:{sign}.4f} ({interval.low:{sign}.4f} to {interval.high:{sign}.4f})"


def _notes(outcome: Outcome) -> list[str]:
    """What has to be known to read the table."""
    count = len(outcome.seeds)
    notes = [
        f"spent: {_SPENT[outcome.currency]}; evaluation is not charged. Steps are as many as the budget allows, and "
        "the schedule is scaled to them. The model of the last step counts, and no run stops early.",
        "intervals: bootstrap over seeds and held-out samples at once, paired between methods; with few seeds they are "
        "too narrow for the spread between seeds.",
    ]
    if any(method.trials for method in outcome.methods):
        notes.insert(1, "learning rates were chosen on another seed and on the other half of the held-out data.")
    if count == 1:
        notes.append("with one seed nothing is known of the spread between seeds: there is no verdict.")
    if contests := [(each.label, each.contest) for each in outcome.methods if each.contest is not None]:
        notes.append(
            "verdict: p is the larger of that bootstrap's and of a paired t-test over seeds, adjusted for the number "
            "of methods (Holm). A tie is a difference that may be chance, and no proof of equality."
        )
        values = ", ".join(f"{label} {contest.signs_p:.3g}" for label, contest in contests)
        text = f"exact permutation test over the {count} seeds alone, not adjusted: p {values}"
        if count < outcome.least_seeds:
            least = f"{2.0 ** (1 - count):.3g}"
            text += f"; it cannot be below {least} with so few, and needs {outcome.least_seeds} seeds to reach 0.05"
        notes.append(f"{text}.")
    if edges := [method.label for method in outcome.methods if method.at_edge]:
        notes.append(
            f"edge: the best learning rate of {', '.join(edges)} is the smallest or largest that was tried; a better "
            "one may lie outside (compare.methods.*.learning_rates)."
        )
    return notes
