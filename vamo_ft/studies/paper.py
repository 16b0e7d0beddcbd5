"""The paper's experiments on synthetic problems: each method with its own step size, on the same seeds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vamo_ft.assemble.directions import build_directions
from vamo_ft.assemble.method import build_estimator, build_update_rule
from vamo_ft.assemble.surroundings import Surroundings
from vamo_ft.config.paper import ArmConfig, ExperimentConfig, arm_run
from vamo_ft.core.errors import StopRequested, VamoFtError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Objective, Runtime
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.studies.curves import ArmResult, CurvePoint, SeedRun, Trial
from vamo_ft.studies.problems import Problem, TensorSamples, build_problem
from vamo_ft.training.callbacks import Callback
from vamo_ft.training.evaluation import evaluate
from vamo_ft.training.progress import SilentProgress
from vamo_ft.training.state import RunState
from vamo_ft.training.trainer import Trainer

__all__ = ["run_arms", "run_experiment"]

_log = logging.getLogger("vamo_ft")


@dataclass(slots=True)
class _LossCurve(Callback):
    """Evaluates the loss over all samples every few steps; neither its passes nor its time are counted."""

    objective: Objective
    samples: TensorSamples
    runtime: Runtime
    surroundings: Surroundings
    every: int
    num_steps: int
    points: list[CurvePoint] = field(default_factory=list)

    def at_boundary(self, state: RunState) -> None:
        """Adds a point before the first step, every few steps and after the last."""
        if state.step % self.every and state.step != self.num_steps:
            return
        result = evaluate(
            self.objective,
            self.samples,
            self.runtime,
            token_budget=self.samples.num_samples,
            progress=self.surroundings.progress,
            stop_requested=self.surroundings.stop_requested,
        )
        work = state.work
        self.points.append(
            CurvePoint(state.step, work.forward_samples, work.backward_samples, state.seconds, result.loss)
        )


def run_experiment(experiment: ExperimentConfig, surroundings: Surroundings) -> list[ArmResult]:
    """Draws or loads the data, then `run_arms`.

    Raises:
        UsageError: the data are not there.
        StopRequested: a signal came.
    """
    return run_arms(experiment, build_problem(experiment.problem), surroundings)


def run_arms(experiment: ExperimentConfig, problem: Problem, surroundings: Surroundings) -> list[ArmResult]:
    """Tunes every method's step size on the tuning seed, then runs every method on every seed.

    The step size is the one with the least training loss after the last step, of the same number of candidates for each
    method. Seeds come in the outer loop, so that what slows the machine for a while slows all methods.

    Raises:
        StopRequested: a signal came.
    """
    inner = replace(surroundings, progress=SilentProgress())
    total = sum(len(arm.learning_rates) + len(experiment.seeds) for arm in experiment.arms)
    with surroundings.progress.task(experiment.title, total) as task:

        def run(arm: ArmConfig, learning_rate: float, seed: int) -> SeedRun:
            result = _run(experiment, arm, problem, inner, learning_rate=learning_rate, seed=seed)
            task.advance()
            return result

        trials = [
            [Trial(rate, run(arm, rate, experiment.tuning_seed).final_loss) for rate in arm.learning_rates]
            for arm in experiment.arms
        ]
        chosen = [min(tried, key=lambda trial: trial.loss).learning_rate for tried in trials]
        runs: list[list[SeedRun]] = [[] for _ in experiment.arms]
        for seed in experiment.seeds:
            for number, arm in enumerate(experiment.arms):
                runs[number].append(run(arm, chosen[number], seed))
    results = [
        ArmResult(arm.label, rate, tried, of_arm)
        for arm, rate, tried, of_arm in zip(experiment.arms, chosen, trials, runs, strict=True)
    ]
    _warn_of_edges(results)
    return results


def _run(
    experiment: ExperimentConfig,
    arm: ArmConfig,
    problem: Problem,
    surroundings: Surroundings,
    *,
    learning_rate: float,
    seed: int,
) -> SeedRun:
    config = arm_run(experiment, arm, seed=seed, learning_rate=learning_rate)
    objective, runtime = problem.objective(seed), LocalRuntime()
    samples = problem.samples(batch_size=experiment.batch_size, seed=seed)
    parameters = TrainableParameters(objective.module)
    directions = build_directions(config, parameters, objective.module)
    curve = _LossCurve(objective, samples, runtime, surroundings, experiment.record_every, experiment.steps)
    trainer = Trainer(
        source=samples,
        estimator=build_estimator(config, objective, parameters, directions, runtime, samples, surroundings),
        update_rule=build_update_rule(config, parameters, directions),
        learning_rate=lambda step: learning_rate,
        num_steps=experiment.steps,
        micro_batch_size=experiment.batch_size,
        callbacks=[curve],
        progress=surroundings.progress,
        stop_requested=surroundings.stop_requested,
        state=RunState(),
    )
    try:
        trainer.train()
    except StopRequested:
        raise
    except VamoFtError as error:  # it diverged, or its probes say nothing any more: a result of this step size
        return SeedRun(seed, curve.points, failure=str(error))
    return SeedRun(seed, curve.points)


def _warn_of_edges(results: Sequence[ArmResult]) -> None:
    for result in results:
        if result.at_edge:
            _log.warning("%s: the best step size, %g, is at the edge of its grid", result.label, result.learning_rate)
