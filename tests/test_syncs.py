"""How often a step waits for the device: for what has to be known before the update, and for nothing else."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.syncs import PACKAGE, SyncCounter
from tests.test_ledger_counts import CASES, SETTING
from tests.workspace import Workspace, merged
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.core.perturbation import Perturber
from vamo_ft.core.prefix import PrefixReuse
from vamo_ft.core.transfer import to_device
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.training.trainer import Trainer

FINITE = "trainer.py:_checked_loss"
"""Loss and coefficients are finite: in every step."""

NORM = "update_rules.py:apply"
"""So is the gradient's norm: of rules that take a gradient, directly after the other."""

REACHED = "spsa.py:estimate"
"""The losses depend on the perturbation: of methods whose every step does, directly before the other."""

ON_THE_HOST = {"table.py:batch_noise", "order.py:take"}
"""Ask host memory."""

ELSEWHERE = {"masking_utils.py:_ignore_causal_mask_sdpa"}
"""transformers asks whether a row is padded, up to twice a forward pass."""

LOW: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "optimizer": {"master_weights": True}}

REACHING = {"spsa", "mezo", "mezo_bcd", "lozo", "subzero", "sparse_mezo", "addax"}
REACHING |= {"zo_adam", "zo_sign", "zo_momentum", "mezo_streamed"}
WITHOUT_GRADIENT = (REACHING - {"addax", "zo_adam", "zo_sign", "zo_momentum"}) | {
    "forward_gradient",
    "zo_svrg",
    "mezo_svrg",
}


KEPT_ELSEWHERE: dict[str, dict[str, Any]] = {
    "svrg_offloaded": {"method": {"name": "svrg", "snapshot": {"offload": True}}},
    "zo_svrg_offloaded": {"method": {"name": "zo_svrg", "snapshot": {"offload": True}}},
    "adamw_masters": {"method": {"name": "adamw"}, **LOW},
    "mezo_masters": {"method": {"name": "mezo"}, **LOW},
}
REACHING |= {"mezo_masters"}
WITHOUT_GRADIENT |= {"mezo_masters", "zo_svrg_offloaded"}


@pytest.mark.parametrize("name", [*METHOD_NAMES, "vamo_recompute", "mezo_streamed", *KEPT_ELSEWHERE])
def test_a_step_waits_once_for_each_thing_it_has_to_know(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters: list[SyncCounter] = []
    update, batch = Trainer._update, TrainingSamples.batch

    def counted_update(self: Trainer, micro_batches: list) -> object:
        if self.state.step < 2:
            return update(self, micro_batches)
        counters.append(SyncCounter())
        with counters[-1].counting():
            return update(self, micro_batches)

    def host_batch(self: TrainingSamples, indices: list[int]) -> object:
        if not counters:
            return batch(self, indices)
        with counters[-1].paused():
            return batch(self, indices)

    monkeypatch.setattr(Trainer, "_update", counted_update)
    monkeypatch.setattr(TrainingSamples, "batch", host_batch)
    # The first use of every set of tensors is compared with a plain evaluation; a later one is not.
    monkeypatch.setattr(Perturber, "checked", lambda self, evaluate, *, plain=None: evaluate())
    monkeypatch.setattr(PrefixReuse, "_compared", lambda self, reused, losses, support: reused[-1])
    workspace.configure(
        merged(
            merged(SETTING, (CASES | KEPT_ELSEWHERE)[name]),
            {"evaluation": {"every": None}, "training": {"batch_size": 3, "micro_batch_size": 2}},
        )
    )
    assert workspace.train() == 0
    assert len(counters) == 1
    allowed = {FINITE: 1}
    allowed |= {REACHED: 1} if name in REACHING else {}
    allowed |= {} if name in WITHOUT_GRADIENT else {NORM: 1}
    last = counters[-1]
    found = {place: count for place, count in last.found.items() if place not in ON_THE_HOST}
    assert found[FINITE] == 1
    assert all(count <= allowed.get(place, 0) for place, count in found.items()), found
    assert set(last.foreign) <= ELSEWHERE


@pytest.mark.parametrize(("name", "other"), [("adamw", NORM), ("mezo", REACHED)])
def test_between_two_lines_of_the_log_nothing_waits_around_the_steps(
    name: str, other: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whole turns of the loop, with what is due before and after each update."""
    counter, counting, made, batch = SyncCounter(), ExitStack(), Trainer._step, TrainingSamples.batch

    def step(self: Trainer) -> object:
        if self.state.step == 2:
            counting.enter_context(counter.counting())
        if self.state.step == 4:
            counting.close()
        return made(self)

    def host_batch(self: TrainingSamples, indices: list[int]) -> object:
        with counter.paused():
            return batch(self, indices)

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(TrainingSamples, "batch", host_batch)
    monkeypatch.setattr(Perturber, "checked", lambda self, evaluate, *, plain=None: evaluate())
    changes = {"training": {"steps": 5}, "logging": {"every": "100 steps"}, "checkpoint": {"every": "100 steps"}}
    workspace.configure(merged(merged(SETTING, CASES[name]), changes))
    assert workspace.train() == 0
    assert {place: count for place, count in counter.found.items() if place not in ON_THE_HOST} == {FINITE: 2, other: 2}
    assert set(counter.foreign) <= ELSEWHERE


WAITS = [
    "bool(values.any())",
    "float(values[0])",
    "values.tolist()",
    "values.cpu()",
    "values[values > 1]",
    "values[[0, 1]]",
    "values.nonzero()",
    "torch.equal(values, values)",
    "values.to(device)",
    "torch.tensor([1, 2], device=device)",
]
GOES_ON = [
    "values * 2 + values[index].sum()",
    "values.to(device, non_blocking=True)",
    "to_device(torch.tensor([1, 2]), device)",
    "values[0]",
    "values.double().to(torch.float32)",
    "torch.zeros(3, device=device).lerp_(values, 0.5)",
]


@pytest.mark.parametrize("code", WAITS + GOES_ON)
def test_the_counter_sees_what_waits(code: str) -> None:
    names = {
        "torch": torch,
        "to_device": to_device,
        "values": torch.arange(3.0),
        "index": torch.tensor([0, 2]),
        "device": torch.device("cpu"),
    }
    place = compile(code, str(PACKAGE / "made_up.py"), "eval")  # as if the package did it
    counter = SyncCounter()
    with counter.counting():
        eval(place, names)
        with counter.paused():
            eval(place, names)
    assert counter.found == ({"made_up.py:<module>": 1} if code in WAITS else {})
