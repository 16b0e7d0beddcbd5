"""When the processes of a run compare their parameters, and how a run ends in which they differ.

One process stands for all of them; that several find a bit in which they differ is tested in tests/test_processes.py.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from tests.workspace import PLAIN, Workspace, merged
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.training import replicas
from vamo_ft.training.state import RunState


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps after which parameters are compared."""
    steps: list[int] = []
    made = replicas.ReplicaCheck.compare

    def compare(self: replicas.ReplicaCheck, state: RunState) -> None:
        steps.append(state.step)
        made(self, state)

    monkeypatch.setattr(replicas.ReplicaCheck, "compare", compare)
    return steps


PERIODS: list[tuple[dict[str, Any], list[int]]] = [
    ({"training": {"check_processes_every": "5 steps"}}, [3, 5, 6, 8]),
    ({}, [3, 6, 8]),
    ({"training": {"check_processes_every": None}}, []),
    ({"training": {"on_divergence": "rollback"}}, [0, 3, 6, 8]),
    ({"checkpoint": {"every": "100 steps"}, "training": {"check_processes_every": "4 steps"}}, [4, 8]),
]


@pytest.mark.parametrize(("changes", "expected"), PERIODS)
def test_they_are_compared_every_so_often_and_before_every_checkpoint(
    changes: dict[str, Any], expected: list[int], workspace: Workspace, compared: list[int]
) -> None:
    """Checkpoints are due every three steps, and after the last one, the eighth."""
    workspace.configure(merged(PLAIN, changes))
    assert workspace.train() == 0
    assert sorted(set(compared)) == expected


@pytest.mark.parametrize(("at", "last"), [(5, "step-00000003"), (8, "step-00000006")])
def test_a_drift_ends_the_run_and_nothing_of_it_is_saved(
    at: int,
    last: str,
    workspace: Workspace,
    compared: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace.configure(merged(PLAIN, {"training": {"check_processes_every": "5 steps"}}))

    def differing(self: LocalRuntime, values: Callable[[], Tensor]) -> list[int]:
        return [1, 2] if compared[-1] == at else []

    with monkeypatch.context() as patch:
        patch.setattr(LocalRuntime, "differing", differing)
        assert workspace.train() == 1
    path = f"runs/tiny/checkpoints/{last}"
    message = (
        f"step {at}: the processes do not hold the same parameters any more (2 of 21 tensors differ, such as "
        "model.embed_tokens.weight): a device, a driver or an operation computed another result in one of "
        f"them; nothing was saved since; its last checkpoint is {path}; to go on, train tiny again with the same "
        "settings (after --fresh: with --set run.name=tiny in its place)"
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    status = json.loads((workspace.directory() / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 1, message)
    assert max(path.name for path in (workspace.directory() / "checkpoints").iterdir()) == last
    assert not (workspace.directory() / "model").exists()
    assert workspace.train() == 0
    assert [line["step"] for line in workspace.metrics() if "loss" in line] == [2, 4, 6, 8]
