"""The synthetic experiments, on random data: what they count, choose and leave behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.paper_figures.figures import table, write_results
from tests.toys import normal
from vamo_ft.assemble.surroundings import Surroundings
from vamo_ft.config.errors import ConfigError
from vamo_ft.config.load import load_experiment
from vamo_ft.config.paper import ExperimentConfig, LeastSquaresConfig
from vamo_ft.core.errors import StopRequested
from vamo_ft.studies.curves import ArmResult, CurvePoint, SeedRun, Trial, band, summary
from vamo_ft.studies.paper import run_arms, run_experiment
from vamo_ft.studies.problems import build_problem, digits_problem
from vamo_ft.training.progress import SilentProgress

SAMPLES, BATCH, STEPS, PROBES = 24, 4, 5, 2
TEXT = """\
title: A small one
problem: {type: least_squares, samples: 24, dimension: 6, flipped: 0.1, seed: 3}
batch_size: 4
steps: 5
record_every: 2
tuning_seed: 9
seeds: [0, 1]
arms:
  - {label: SGD, method: {name: sgd}, learning_rates: [0.5, 0.1]}
  - {label: VAMO, method: {name: vamo, probes: 2, alpha: 1.0, eps: 1e-3}, learning_rates: [0.5, 0.1]}
  - {label: SVRG, method: {name: svrg, alpha_decay: none}, learning_rates: [0.5, 0.1]}
  - {label: ZO-SGD, method: {name: spsa, probes: 2}, learning_rates: [0.05, 0.1]}
  - {label: ZO-SVRG, method: {name: zo_svrg, probes: 2}, learning_rates: [0.05, 0.1]}
"""
# samples of forward and backward passes after 0, 2, 4 and 5 steps, worked out by hand
COUNTS = {
    "SGD": [(0, 0), (8, 8), (16, 16), (20, 20)],
    "VAMO": [(0, 0), (96 + 8, 8), (96 + 16, 16), (96 + 20, 20)],  # snapshot: 2q forward passes over 24 samples
    "SVRG": [(0, 0), (24 + 16, 24 + 16), (24 + 32, 24 + 32), (24 + 40, 24 + 40)],
    "ZO-SGD": [(0, 0), (32, 0), (64, 0), (80, 0)],  # 2q passes a step
    "ZO-SVRG": [(0, 0), (96 + 4 + 32, 0), (96 + 4 + 96, 0), (96 + 4 + 128, 0)],  # one pass in the first step, then 4q
}


def surroundings(*, stop_requested=lambda: False) -> Surroundings:
    return Surroundings(progress=SilentProgress(), stop_requested=stop_requested)


def load(text: str, folder: Path) -> ExperimentConfig:
    path = folder / "e.yaml"
    path.write_text(text, encoding="utf-8")
    return load_experiment(path)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    return load(TEXT, tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def results(experiment: ExperimentConfig) -> list[ArmResult]:
    return run_experiment(experiment, surroundings())


def without_time(results: list[ArmResult]) -> list[ArmResult]:
    return [
        replace(arm, runs=[replace(run, points=[replace(p, seconds=0.0) for p in run.points]) for run in arm.runs])
        for arm in results
    ]


def test_evaluations_are_counted_and_those_of_the_curve_are_not(results: list[ArmResult]) -> None:
    assert [arm.label for arm in results] == list(COUNTS)
    for arm in results:
        assert [run.seed for run in arm.runs] == [0, 1]
        for run in arm.runs:
            assert [point.step for point in run.points] == [0, 2, 4, 5]
            assert [(point.forward_samples, point.backward_samples) for point in run.points] == COUNTS[arm.label]
            assert [point.seconds for point in run.points] == sorted(point.seconds for point in run.points)
    assert results[0].runs[0].points[-1].evaluations == 60


def test_an_experiment_is_a_function_of_its_file(experiment: ExperimentConfig, results: list[ArmResult]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(123)
        again = run_experiment(experiment, surroundings())
    assert without_time(again) == without_time(results)


def test_methods_share_the_start_of_a_seed_and_seeds_differ(results: list[ArmResult]) -> None:
    starts = {run.points[0].loss for arm in results for run in arm.runs if run.seed == 0}
    assert len(starts) == 1
    assert len({run.points[0].loss for run in results[0].runs}) == 2


def test_the_recorded_loss_and_the_path_are_those_of_the_formula(experiment, results) -> None:
    """SGD on the least squares, written out, with the gradient by hand."""
    problem = build_problem(experiment.problem)
    a, y = problem.features, problem.targets["targets"]
    run = results[0].runs[1]
    x = next(problem.objective(1).module.parameters()).detach().clone()
    samples = problem.samples(batch_size=BATCH, seed=1)
    losses = []
    for step in range(STEPS + 1):
        if step in (0, 2, 4, 5):
            losses.append(float(((y - torch.sigmoid(a @ x)) ** 2).mean()))
        rows = list(samples.step_indices(step))
        p = torch.sigmoid(a[rows] @ x)
        x -= results[0].learning_rate * ((2 * (p - y[rows]) * p * (1 - p)).unsqueeze(1) * a[rows]).mean(0)
    assert [point.loss for point in run.points] == pytest.approx(losses, rel=1e-12)


def test_the_step_size_is_the_best_on_the_tuning_seed(results: list[ArmResult]) -> None:
    for arm in results:
        assert arm.learning_rate == min(arm.trials, key=lambda trial: trial.loss).learning_rate
        assert arm.at_edge  # of two, either is
    assert not ArmResult("m", 0.2, [Trial(0.1, 2.0), Trial(0.2, 1.0), Trial(0.3, 2.0)], []).at_edge


def test_data_have_the_stated_share_of_wrong_labels() -> None:
    clean = build_problem(LeastSquaresConfig(type="least_squares", samples=4000, dimension=5, flipped=0.0))
    noisy = build_problem(LeastSquaresConfig(type="least_squares", samples=4000, dimension=5, flipped=0.2))
    assert torch.equal(clean.features, noisy.features)
    wrong = (clean.targets["targets"] != noisy.targets["targets"]).double().mean()
    assert 0.17 < float(wrong) < 0.23
    # without flips a plane through the origin separates the labels
    weights = torch.linalg.lstsq(clean.features, clean.targets["targets"].unsqueeze(1) - 0.5).solution
    assert (
        float(((clean.features @ weights > 0).squeeze(1).double() == clean.targets["targets"]).double().mean()) > 0.95
    )


def test_the_network_learns_random_digits(experiment: ExperimentConfig) -> None:
    images, digits = normal(SAMPLES, 12, seed=1).abs(), torch.arange(SAMPLES) % 10
    problem = digits_problem(images, digits, hidden=4)
    parameters = problem.objective(0).module.state_dict()
    hidden = torch.relu(images @ parameters["inner.weight"].T + parameters["inner.bias"])
    logits = hidden @ parameters["outer.weight"].T + parameters["outer.bias"]
    expected = (logits.logsumexp(1) - logits[torch.arange(SAMPLES), digits]).mean()
    results = run_arms(experiment, problem, surroundings())
    for arm in results:
        assert arm.runs[0].points[0].loss == pytest.approx(float(expected), rel=1e-12)
    assert results[0].runs[0].final_loss < float(expected)


def test_a_diverged_run_is_a_result_and_a_stop_is_none(experiment: ExperimentConfig) -> None:
    arm = experiment.arms[0].model_copy(update={"learning_rates": [1e300, 0.1]})
    problem = digits_problem(normal(SAMPLES, 3, seed=1), torch.arange(SAMPLES) % 10, hidden=2)
    [result] = run_arms(experiment.model_copy(update={"arms": [arm]}), problem, surroundings())
    assert result.trials[0].loss == float("inf")
    assert result.learning_rate == 0.1
    with pytest.raises(StopRequested):
        run_arms(experiment, problem, surroundings(stop_requested=lambda: True))


def curve(*losses: float, work: int, failure: str | None = None) -> SeedRun:
    return SeedRun(0, [CurvePoint(n, n * work, n * work, float(n), loss) for n, loss in enumerate(losses)], failure)


def test_the_summary_compares_at_equal_steps_and_at_equal_evaluations() -> None:
    cheap = ArmResult("cheap", 0.1, [], [curve(8.0, 4.0, 2.0, work=10), curve(8.0, 6.0, 4.0, work=10)])
    dear = ArmResult("dear", 0.1, [], [curve(8.0, 3.0, 1.0, work=20), curve(8.0, 3.0, 1.0, work=20)])
    lost = ArmResult("lost", 0.1, [], [curve(8.0, work=1, failure="diverged"), curve(8.0, 7.0, 7.0, work=50)])
    numbers = summary([cheap, dear, lost])
    assert numbers["budget"] == 60  # two steps of 10 forward and 10 backward evaluations
    steps = {row["label"]: row["equal_steps"] for row in numbers["methods"]}
    assert steps["cheap"] == {"mean": 3.0, "deviation": pytest.approx(2**0.5)}
    assert steps["dear"]["mean"] == 1.0
    evaluations = {row["label"]: row["equal_evaluations"]["mean"] for row in numbers["methods"]}
    assert evaluations == {"cheap": 3.0, "dear": 3.0, "lost": None}
    assert [row["failures"] for row in numbers["methods"]] == [0, 0, 1]
    assert "| lost | 0.1 | - | - |" in table({"title": "t", **numbers})


def test_a_budget_that_reaches_no_point_has_no_loss() -> None:
    late = SeedRun(0, curve(8.0, 4.0, work=20).points[1:])
    assert late.loss_within(60) == 4.0
    assert late.loss_within(59) == float("inf")


def test_a_band_is_mean_least_and_most() -> None:
    arm = ArmResult("m", 0.1, [], [curve(8.0, 4.0, work=10), curve(8.0, 6.0, 5.0, work=10)])
    found = band(arm, lambda point: point.evaluations)
    assert (found.x, found.middle, found.low, found.high) == ([0, 30], [8.0, 5.0], [8.0, 4.0], [8.0, 6.0])


def test_results_become_a_picture_and_numbers(results: list[ArmResult], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_results("small", "A small one", results, facts={"threads": 1}, out=tmp_path / folder)
    png = (tmp_path / "one" / "small.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 10_000
    assert png == (tmp_path / "two" / "small.png").read_bytes()
    written = json.loads((tmp_path / "one" / "small.json").read_text())
    assert [arm["label"] for arm in written["arms"]] == list(COUNTS)
    assert "arms" not in json.loads((tmp_path / "one" / "small.summary.json").read_text())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("record_every", "record_evry", "5: record_evry: unknown key. Did you mean 'record_every'?"),
        ("tuning_seed: 9", "tuning_seed: 1", "6: tuning_seed: 1 is one of seeds, whose results it would favour"),
        ("[0, 1]", "[0, 0]", "7: seeds: the same seed twice is the same run"),
        ("probes: 2, alpha", "probs: 2, alpha", "10: arms.1.method.probs: unknown key. Did you mean 'probes'?"),
        ("[0.05, 0.1]", "[0.05]", "8: arms: all must try the same number of learning_rates"),
        ("label: VAMO", "label: SGD", "8: arms: two have the label 'SGD'"),
        (
            "{name: sgd}",
            "{name: adamw}",
            "9: arms.0.method.name: adamw goes through adamw, and every method here through sgd",
        ),
        ("{name: sgd}", "{name: zo_momentum}", "9: arms.0.optimizer.momentum: 0 contradicts method.name: zo_momentum"),
        ("name: vamo", "name: vamoo", "10: arms.1.method.name: must be 'first_order', 'sgd'"),
        ("type: least_squares", "type: cubes", "2: problem.type: must be 'least_squares' or 'digits', not 'cubes'"),
        ("0.1, seed: 3", "0.7, seed: 3", "2: problem.flipped: must be below 0.5, not 0.7"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, problem: str, tmp_path: Path) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        load(TEXT.replace(old, new), tmp_path)
    assert any(f"e.yaml:{problem}" in line for line in caught.value.problems), caught.value.problems
