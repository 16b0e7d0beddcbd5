"""`vamo-ft diagnose`: what a configured method does on its own model and data, in figures."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vamo_ft.assemble import build_subject
from vamo_ft.commands.console import logging_to, output_console
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.report.plots import Band, ErrorPanel, VariancePanel, draw_diagnosis
from vamo_ft.studies.diagnose import Diagnosis
from vamo_ft.studies.diagnose import diagnose as measure
from vamo_ft.studies.intervals import Interval
from vamo_ft.studies.variance import VarianceSummary
from vamo_ft.training.progress import ConsoleProgress
from vamo_ft.training.rundir import write_json
from vamo_ft.training.runtime import memory_errors_explained
from vamo_ft.training.sinks import finite

__all__ = ["diagnose"]

_WIDTH = 120


def diagnose(
    config: RunConfig, *, out: Path | None, samples: int, steps: int, batches: int, use_cache: bool = True
) -> None:
    """Prints the measurements and the verdict; writes `diagnose.json` and `diagnose.png`.

    The model is trained in memory only.

    Args:
        out: folder of the two files; None: `<output_dir>/<run name>-diagnose`.
        samples: held-out samples whose gradients are taken one by one.
        steps: of training before the measurements.
        batches: held-out batches whose gradients' variance is measured.
        use_cache: keep tokens, and take them from where they were kept.

    Raises:
        UsageError: the method has nothing to diagnose, or the folder cannot be written to.
        DataError: model or data are not what the configuration says.
    """
    folder = Path(config.run.output_dir) / f"{config.run.name}-diagnose" if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be made ({error.strerror}); name another folder") from None
    progress = Console(stderr=True)
    with logging_to(progress), memory_errors_explained("a measurement"):
        subject = build_subject(config, ConsoleProgress(progress), use_cache=use_cache)
        found = measure(subject, samples=samples, steps=steps, batches=batches)
    write_json(folder / "diagnose.json", finite(asdict(found)))
    _draw(folder / "diagnose.png", found)
    console = output_console(_WIDTH)
    _print(console, found)
    console.print(f"written: {folder / 'diagnose.json'}, {folder / 'diagnose.png'}", highlight=False, soft_wrap=True)


def _print(console: Console, found: Diagnosis) -> None:
    def tell(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    tell(
        f"after {found.step} steps; {found.num_trainable:,} trainable parameters, {found.num_probes} probes, "
        f"{found.num_samples} samples, {found.num_batches} batches"
    )
    if found.seen:
        tell(f"{found.seen} of these samples were trained on too: the data has no others")
    _print_errors(console, found)
    if (noise := found.errors[0].loss_noise) is not None:
        tell(f"rounding noise of a sample's loss: {noise:.1e}")
    shares = [(name, f"{share:.3g}") for name, share in found.shares.items()]
    if found.uninformed is not None:
        shares.append(("informed", f"left out: {found.uninformed}"))
    title = f"share of the per-sample gradient noise in the span of {found.num_probes} directions"
    _table(console, title, ("directions", "share"), shares)
    tell(f"|mean gradient|^2 / |noise of one sample|^2: {found.signal_to_noise:.3g}")
    reach = [(name, f"{each.stable_rank:,.1f}", f"{each.overlap:.3g}") for name, each in found.reach.items()]
    _table(console, "what the directions reach", ("part", "stable rank", "overlap with the gradient"), reach)
    if found.variance is not None:
        _print_variance(console, found.variance)
        tell(f"mean: over the {found.period} steps between two snapshots; the last age measured stands for later ones")
    cost = found.cost
    epochs = [
        (name, f"{epoch.forward_samples:,.0f}", f"{epoch.backward_samples:,.0f}", f"{epoch.flops:.3g}")
        for name, epoch in (("back-propagation", cost.plain), ("with the method", cost.method))
    ]
    _table(console, "cost of an epoch", ("", "forward samples", "backward samples", "FLOPs"), epochs)
    tell(f"kappa {cost.kappa:.3f}: the same compute as a larger batch gives the ratio 1/kappa = {1 / cost.kappa:.3f}")
    tell(f"\n{found.size_verdict}")
    if found.verdict is not None:
        tell(found.verdict.text)


def _print_errors(console: Console, found: Diagnosis) -> None:
    for curve in found.errors:
        rows = [
            (
                f"{each.size:.1e}",
                f"{each.relative_error:.3g}",
                f"{each.correlation:.3f}",
                "best" if each.size == curve.recommended else "usable" if curve.holds(each.size) else "",
            )
            for each in curve.errors
        ]
        size = found.size_key.removeprefix("method.")
        title = f"error of {curve.difference} differences against back-propagation"
        _table(console, title, (size, "relative error", "correlation", ""), rows)


def _print_variance(console: Console, variance: VarianceSummary) -> None:
    rows = [
        (str(row.age), f"{row.alpha:.2f}", *map(_interval, (row.configured, row.one, row.best, row.best_alpha)))
        for row in variance.rows
    ]
    rows.append(("mean", "", _interval(variance.configured), "", _interval(variance.best), ""))
    columns = ("age", "alpha", "ratio", "ratio at alpha 1", "ratio at best alpha", "best alpha")
    _table(console, "variance, corrected / plain, with 90 % intervals", columns, rows)


def _table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", highlight=False)
    console.print(table)


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f}..{interval.high:.3f})"


def _draw(path: Path, found: Diagnosis) -> None:
    first = found.errors[0]
    errors = ErrorPanel(
        label=found.size_key.removeprefix("method."),
        sizes=[each.size for each in first.errors],
        errors={curve.difference: [each.relative_error for each in curve.errors] for curve in found.errors},
        usable=first.usable,
        recommended=first.recommended,
        configured=found.size,
    )
    variance = None
    if found.variance is not None:
        rows = found.variance.rows
        variance = VariancePanel(
            ages=[row.age for row in rows],
            ratios={
                "configured alpha": _band([row.configured for row in rows]),
                "alpha 0": _band([Interval(1.0, 1.0, 1.0) for _ in rows]),
                "alpha 1": _band([row.one for row in rows]),
                "optimal alpha": _band([row.best for row in rows]),
            },
            same_compute=1 / found.cost.kappa,
        )
    draw_diagnosis(path, errors=errors, variance=variance)


def _band(intervals: list[Interval]) -> Band:
    return Band([i.value for i in intervals], [i.low for i in intervals], [i.high for i in intervals])
