"""SVRG and zeroth-order SVRG through the command line: schedules, counts and learning."""

from itertools import pairwise

import pytest

from tests.workspace import ADAMW, Workspace


def training_lines(workspace: Workspace, name: str = "tiny") -> list[dict]:
    return [line for line in workspace.metrics(name) if "loss" in line]


def test_alpha_falls_to_zero_over_the_run_and_the_work_is_counted(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"method": {"name": "svrg", "alpha": 0.5, "snapshot": {"every": "4 steps"}}})
    assert workspace.train() == 0
    lines = training_lines(workspace)
    assert [line["method.alpha"] for line in lines] == pytest.approx([0.5 * (1 - step / 8) for step in (1, 3, 5, 7)])
    assert [line["method.snapshot_age"] for line in lines] == [1, 3, 1, 3]
    assert lines[-1]["forward_evals"] == lines[-1]["backward_evals"] == 8 * 6 * 2 + 2 * 20
    assert workspace.train("--set", "training.steps=9") == 0
    assert "the linear decay of method.alpha goes on as if" in capsys.readouterr().err
    assert workspace.train("--set", "run.name=constant", "--set", "method.alpha_decay=none") == 0
    assert [line["method.alpha"] for line in training_lines(workspace, "constant")] == [0.5] * 4


def test_a_full_step_every_second_step_with_a_learning_rate_of_its_own(workspace: Workspace) -> None:
    settings = {"method": {"name": "mezo_svrg"}, "optimizer": {"learning_rate": 1e-5}, "logging": {"every": "1 step"}}
    workspace.configure(settings)
    assert workspace.train() == 0
    lines = training_lines(workspace)
    full, between = 2 * 20 + 6, 4 * 6
    spent = [0, *(line["forward_evals"] for line in lines)]
    assert [after - before for before, after in pairwise(spent)] == [full, between] * 4
    assert lines[-1]["backward_evals"] == 0
    assert workspace.train("--set", "run.name=equal", "--set", "method.full_step_scale=1.0") == 0
    assert workspace.weights() != workspace.weights("equal")
    assert (
        workspace.train(
            "--set", "run.name=zo", "--set", "method.name=zo_svrg", "--set", "method.snapshot.every=2 steps"
        )
        == 0
    )
    assert workspace.weights("equal") == workspace.weights("zo")


def test_svrg_learns_through_adamw(workspace: Workspace) -> None:
    workspace.configure({"method": {"name": "svrg"}, **ADAMW, "training": {"steps": 24}})
    assert workspace.train() == 0
    losses = [line["eval.loss"] for line in workspace.metrics() if "eval.loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_a_metric_that_does_not_move_moves_nothing(workspace: Workspace) -> None:
    """Far too small a perturbation, which on a loss would be an error."""
    objective = {"objective": {"type": "metric", "name": "accuracy"}, "optimizer": {"learning_rate": 1.0}}
    workspace.configure({**objective, "method": {"name": "mezo_svrg", "eps": 1e-9}, "training": {"steps": 3}})
    assert workspace.train() == 0
    assert {line["method.full_gradient"] for line in training_lines(workspace)} == {0.0}
    assert len({line["eval.accuracy"] for line in workspace.metrics() if "eval.loss" in line}) == 1
