"""Methods at equal budget: pilots, runs that choose learning rates, runs that are reported, and what comes out."""

import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vamo_ft.assemble import Surroundings, evaluate_model
from vamo_ft.assemble.pilot import StepCost, run_pilot
from vamo_ft.config.arms import Arm
from vamo_ft.config.comparison import CompareConfig
from vamo_ft.config.period import Period
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DataError, DivergenceError, VamoFtError
from vamo_ft.core.types import Batch, EvaluationTerms
from vamo_ft.studies.budget import plan_steps, price, spent
from vamo_ft.studies.comparison_file import ComparisonFile
from vamo_ft.studies.outcome import Outcome, compared_metric, draw_conclusions, rank
from vamo_ft.studies.records import RunRecord, SampleScores, State, read_metrics
from vamo_ft.training.checkpoint import newest_checkpoint
from vamo_ft.training.ledger import Ledger, reset_peak_memory
from vamo_ft.training.rundir import RunDirectory, write_json

__all__ = ["Comparison", "Execute"]

_SCORES = "scores.json"
_TO_THE_END: Mapping[str, Any] = {
    "metric_for_best_model": None,
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "early_stopping_threshold": 0.0,
}


class Execute(Protocol):
    """Trains one run as `vamo-ft train` does, from its newest checkpoint where there is one."""

    def __call__(self, config: RunConfig, *, seconds: float | None) -> bool:
        """Whether it came to its end; False: it has trained for `seconds`, and a checkpoint holds what came out.

        Raises:
            StopRequested: a signal came.
            VamoFtError: it cannot be finished.
        """


@dataclass(slots=True)
class Comparison:
    """Every run of a comparison, one after the other; goes on where it was left.

    Each method's learning rate is the one that does best on the tuning seed and the `tune` half of the held-out data.
    The runs that are reported have other seeds, and are evaluated on the `test` half. A run that diverges counts as
    the worst, and the comparison goes on.

    Attributes:
        config: the file's own run, with its `compare` section.
        arms: the methods.
        folder: holds `compare.json` and `runs/`.
        execute: trains one run.
        surroundings: of pilots and evaluations.
        tell: is given a line before and after every run.
    """

    config: RunConfig
    arms: Sequence[Arm]
    folder: Path
    execute: Execute
    surroundings: Surroundings
    tell: Callable[[str], None]
    _file: ComparisonFile = field(init=False)
    _begun: int = field(init=False, default=0)
    reported: list[RunRecord] = field(init=False, default_factory=list)
    """The runs of the seeds, once they are made."""

    def run(self) -> Outcome:
        """Makes what is left to make.

        Raises:
            UsageError: the folder holds a comparison with other settings, or the budget is too small for a step.
            StopRequested: a signal came; the same call goes on.
            VamoFtError: a run failed for a reason that is not its learning rate.
        """
        self._file, self._begun = ComparisonFile(self.folder / "compare.json"), 0
        self._file.agree(
            self._compare.model_dump(mode="json", exclude={"seeds", "methods"}),
            {arm.label: arm.config.model_dump(mode="json", exclude={"compare"}) for arm in self.arms},
        )
        for arm in self.arms:
            self._plan(arm)
        trials = {arm.label: [self._run(arm, rate, tuning=True) for rate in _tried(arm)] for arm in self.arms}
        metric = compared_metric(self.config)
        chosen = {
            arm.label: rank(trials[arm.label], metric)[0].learning_rate if _tried(arm) else arm.learning_rates[0]
            for arm in self.arms
        }
        runs: dict[str, list[RunRecord]] = {arm.label: [] for arm in self.arms}
        for seed in self._compare.seeds:  # in the outer loop: what slows the machine for a while slows all methods
            for arm in self.arms:
                runs[arm.label].append(self._run(arm, chosen[arm.label], seed=seed))
        self.reported = [run for of_arm in runs.values() for run in of_arm]
        outcome = draw_conclusions(
            self.config, self._file.plans, trials=trials, runs=runs, chosen=chosen, scores=self._scores
        )
        self._file.finish(asdict(outcome))
        return outcome

    @property
    def _compare(self) -> CompareConfig:
        assert self.config.compare is not None
        return self.config.compare

    @property
    def _total(self) -> int:
        return sum(len(self._compare.seeds) + len(_tried(arm)) for arm in self.arms)

    def _plan(self, arm: Arm) -> None:
        """Measures what the method's steps cost, unless that is known."""
        if arm.label in self._file.plans:
            return
        budget, total = self._compare.budget, 0.0

        def enough(cost: StepCost, ledger: Ledger) -> bool:
            nonlocal total
            total += price(cost, ledger, budget.currency)
            return total > budget.amount

        pilot = run_pilot(
            arm.config,
            self.surroundings,
            timed=budget.currency == "seconds",
            by_layer=budget.currency in ("flops", "seconds"),
            enough=enough,
        )
        plan = plan_steps(pilot, budget, label=arm.label, warmup_steps=arm.config.schedule.warmup_steps)
        self._file.add_plan(arm.label, plan)
        self.tell(f"{arm.label}: {plan.steps} steps for {plan.expected:.6g} of {budget}")
        del pilot
        gc.collect()

    def _run(self, arm: Arm, learning_rate: float, *, seed: int | None = None, tuning: bool = False) -> RunRecord:
        """One run's record, from the file or by making the run."""
        seed = self._compare.tuning_seed if seed is None else seed
        self._begun += 1
        if (known := self._file.runs.get((arm.label, learning_rate, seed))) is not None:
            return known
        name = f"{arm.label}-lr{learning_rate:g}-seed{seed}"
        place = f"run {self._begun} of {self._total}: {name}"
        self.tell(f"{place}{' (choosing the learning rate)' if tuning else ''}")
        config = self._run_config(arm, learning_rate, seed, name=name, tuning=tuning)
        directory = RunDirectory(self.folder / "runs" / name)
        gc.collect()  # a model may stand in a cycle of references
        reset_peak_memory()
        state, message = self._executed(config)
        record = self._recorded(arm, config, directory, state=state, message=message, tuning=tuning)
        self._file.add_run(record)
        shutil.rmtree(directory.checkpoints, ignore_errors=True)
        shown = "diverged" if record.final is None else _figures(record.final)
        self.tell(f"{place}: {shown}; {record.steps} steps, {record.seconds:.0f} s")
        return record

    def _executed(self, config: RunConfig) -> tuple[State, str | None]:
        compare = self._compare
        seconds = compare.budget.amount if compare.budget.currency == "seconds" else None
        try:
            return ("finished" if self.execute(config, seconds=seconds) else "out of time"), None
        except DivergenceError as error:
            return "diverged", str(error)
        except VamoFtError as error:
            if error.exit_code != VamoFtError.exit_code:
                raise
            return "diverged", str(error)  # its losses say nothing any more

    def _recorded(
        self, arm: Arm, config: RunConfig, directory: RunDirectory, *, state: State, message: str | None, tuning: bool
    ) -> RunRecord:
        currency = self._compare.budget.currency
        points, line = read_metrics(directory.metrics, currency)
        final = None
        if state != "diverged":
            final = self._scored(config, directory, finished=state == "finished")
            if final is None:
                state, message = "diverged", "the held-out loss of the final model is not finite"
        return RunRecord(
            label=arm.label,
            learning_rate=config.optimizer.learning_rate,
            seed=config.run.seed,
            tuning=tuning,
            state=state,
            message=message,
            steps=0 if line is None else line["step"],
            spent=0.0 if line is None else spent(line, currency),
            evaluations=0 if line is None else int(spent(line, "evaluations")),
            tokens=0 if line is None else int(spent(line, "tokens")),
            flops=0 if line is None else line["flops"],
            seconds=0.0 if line is None else line["seconds"],
            peak_memory_bytes=0 if line is None else line["peak_memory_bytes"],
            points=points,
            final=final,
        )

    def _scored(self, config: RunConfig, directory: RunDirectory, *, finished: bool) -> Mapping[str, float] | None:
        """What the final model makes of its half of the held-out data, by sample on disk and in the mean."""
        weights = directory.model
        if not finished:
            checkpoint = newest_checkpoint(directory.checkpoints)
            assert checkpoint is not None, "a run that the clock stops is saved"
            weights = checkpoint.model_dir
        seen: list[tuple[Batch, EvaluationTerms]] = []
        assert config.data.evaluation is not None
        evaluate_model(
            config,
            config.data.evaluation,
            weights=weights,
            progress=self.surroundings.progress,
            use_cache=self.surroundings.use_cache,
            stop_requested=self.surroundings.stop_requested,
            observers=[lambda batch, terms: seen.append((batch, terms))],
        )
        scores = SampleScores.of(seen)
        write_json(directory.root / _SCORES, scores.plain())
        return scores.means()

    def _scores(self, run: RunRecord) -> SampleScores:
        name = f"{run.label}-lr{run.learning_rate:g}-seed{run.seed}"
        path = self.folder / "runs" / name / _SCORES
        try:
            return SampleScores.from_plain(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}: cannot be read ({type(error).__name__}); put it back, or start anew with --fresh"
            ) from None

    def _run_config(self, arm: Arm, learning_rate: float, seed: int, *, name: str, tuning: bool) -> RunConfig:
        """The configuration of one run, which `vamo-ft train` takes as well.

        It spends its budget to the end, at its own learning rate, and its last model is the one that counts: a run that
        ended early would have spent less than the others, and the best evaluation is one on the half that is reported.
        """
        config, plan = arm.config, self._file.plans[arm.label]
        every = None if tuning else Period(max(1, round(plan.steps / self._compare.points)), "step")
        # What had been spent is read from training lines: at evaluations, and wherever the clock may stop a run.
        logged = Period(1, "step") if self._compare.budget.currency == "seconds" else every or config.logging.every
        evaluation = {
            "every": every,
            "part": "tune" if tuning else "test",
            "metrics": list(dict.fromkeys(["loss", *config.evaluation.metrics])),
            **_TO_THE_END,
        }
        return config.model_copy(
            update={
                "run": config.run.model_copy(
                    update={"name": name, "output_dir": str(self.folder / "runs"), "seed": seed}
                ),
                "optimizer": config.optimizer.model_copy(update={"learning_rate": learning_rate}),
                "schedule": config.schedule.model_copy(update={"warmup_steps": plan.warmup_steps}),
                "training": config.training.model_copy(
                    update={"steps": plan.steps, "epochs": None, "on_divergence": "stop"}
                ),
                "evaluation": config.evaluation.model_copy(update=evaluation),
                "logging": config.logging.model_copy(update={"every": logged}),
            }
        )


def _tried(arm: Arm) -> tuple[float, ...]:
    """The learning rates to choose from; none where there is no choice."""
    return arm.learning_rates if len(arm.learning_rates) > 1 else ()


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
