"""`compare.json`: what a comparison has come to, kept so that it can go on."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vamo_ft.config.compare import meaning_changes
from vamo_ft.core.errors import DataError, UsageError
from vamo_ft.studies.budget import Plan
from vamo_ft.studies.records import RunRecord
from vamo_ft.training.rundir import write_json
from vamo_ft.training.sinks import finite

__all__ = ["ComparisonFile"]

_FREE = (
    "run",
    "optimizer.learning_rate",
    "training.max_seconds",
    "training.forward_batch_tokens",
    "checkpoint",
    "logging",
)
"""What of a method's configuration may differ when the comparison goes on; each run has its own seed and rate."""

Key = tuple[str, float, int]
"""Label, learning rate and seed of a run."""


class ComparisonFile:
    """Settings, plans, runs and results, written in one step whenever something is added.

    Seeds, learning rates and methods may be added to a comparison; what is there stays.

    Args:
        path: of the file; one that is there is read.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings: dict[str, Any] = {}
        self.plans: dict[str, Plan] = {}
        self.runs: dict[Key, RunRecord] = {}
        if not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self._settings = content["settings"]
            self.plans = {label: Plan(**plan) for label, plan in content["plans"].items()}
            self.runs = {_key(run): run for run in map(RunRecord.from_plain, content["runs"])}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}: cannot be read ({type(error).__name__}); put it back, or start anew with --fresh"
            ) from None

    def agree(self, compare: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the settings in, where they do not contradict those of runs that are there.

        Args:
            compare: settings of the whole comparison.
            methods: label -> configuration.

        Raises:
            UsageError: they do; names them.
        """
        known = self._settings.get("methods", {})
        changes = meaning_changes(self._settings.get("compare", compare), compare, free=())
        for label in known.keys() & methods.keys():
            changes += [f"{label}: {change}" for change in meaning_changes(known[label], methods[label], free=_FREE)]
        if changes:
            raise UsageError(
                f"{self.path.parent} holds a comparison with other settings ({'; '.join(sorted(set(changes)))}); "
                "change them back, or start anew with --fresh or another --out"
            )
        self._settings = {"compare": dict(compare), "methods": {**known, **methods}}
        self._write(None)

    def add_plan(self, label: str, plan: Plan) -> None:
        """Keeps a method's length."""
        self.plans[label] = plan
        self._write(None)

    def add_run(self, run: RunRecord) -> None:
        """Keeps a run that has ended."""
        self.runs[_key(run)] = run
        self._write(None)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Keeps what came out."""
        self._write(results)

    def _write(self, results: Mapping[str, Any] | None) -> None:
        content = {
            "state": "running" if results is None else "finished",
            "settings": self._settings,
            "plans": {label: asdict(plan) for label, plan in self.plans.items()},
            "runs": [run.plain() for run in self.runs.values()],
            "results": results,
        }
        try:
            write_json(self.path, finite(content))
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}); mend it, and run again") from None


def _key(run: RunRecord) -> Key:
    return run.label, run.learning_rate, run.seed
