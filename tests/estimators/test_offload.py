"""Snapshots in host memory: the same estimates bit for bit, and nothing of their size on the device between steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.estimators.relatives import build_svrg, build_zo_svrg, token_problem
from tests.memories import two_memories
from tests.toys import NetworkObjective, build_literal, build_vamo, gradient, move

BUILDERS: dict[str, Callable[..., Any]] = {
    "svrg": build_svrg,
    "zo_svrg": build_zo_svrg,
    "vamo_literal": build_literal,
    "vamo_recompute": lambda objective, **changes: build_vamo(objective, source="recompute", **changes),
}


def estimates(build: Callable[..., Any], *, dtype: torch.dtype, offload: bool) -> tuple[list[Tensor], Any]:
    """Of six steps with two snapshots, the state saved and restored between them, and everything that moved."""
    objective, source = token_problem(dtype)

    def fresh() -> Any:
        return build(objective, offload=offload, snapshot_due=lambda step: step == 3)

    estimator, found = fresh(), []
    for step in range(6):
        estimator.prepare(source, step)
        indices = source.step_indices(step)
        estimate = estimator.estimate([source.batch(indices[:3]), source.batch(indices[3:])], step)
        found.append(_result(objective, estimate))
        move(objective, 0.01)
        if step == 1:
            state, estimator = estimator.state_dict(), fresh()
            estimator.load_state_dict(state)
    return [*found, *(p.detach() for p in objective.module.parameters())], estimator


def _result(objective: NetworkObjective, estimate: Any) -> Tensor:
    return gradient(objective).clone() if estimate.projected is None else estimate.projected.coefficients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDERS)
def test_offloaded_snapshots_give_the_same_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = estimates(BUILDERS[name], dtype=dtype, offload=False)
    with two_memories(monkeypatch) as memories:
        offloaded, _ = estimates(BUILDERS[name], dtype=dtype, offload=True)
        assert memories.lent == 0
        assert 0 < memories.most <= memories.largest + 3 * 4, "a matrix, and the bias that came before it"
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    assert not torch.equal(plain[0], plain[4])


@pytest.mark.parametrize(("name", "expected"), [("svrg", 16), ("zo_svrg", 12), ("vamo_recompute", 12)])
def test_what_a_step_moves_is_what_the_readme_says(name: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot to the device, the present values to the host and back, and svrg's full gradient."""
    objective, source = token_problem(torch.float32)
    with two_memories(monkeypatch) as memories:
        estimator = BUILDERS[name](objective, offload=True)
        estimator.prepare(source, 0)
        before = memories.moved
        estimator.estimate([source.batch(source.step_indices(1))], 1)
        assert memories.moved - before == expected * sum(p.numel() for p in objective.module.parameters())
