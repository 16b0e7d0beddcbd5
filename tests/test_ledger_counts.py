"""Every method's account of its evaluations against the model's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from tests.workspace import LORA, Workspace, merged
from vamo_ft.assemble import model
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.core.perturbation import Perturber
from vamo_ft.core.prefix import PrefixReuse
from vamo_ft.core.types import Work
from vamo_ft.training.trainer import Trainer

NEEDS: dict[str, dict[str, Any]] = {
    "first_order": {"optimizer": {"name": "adamw"}},
    "vamo": {"method": {"probes": 2, "snapshot": {"every": "2 steps"}}},
    "sparse_mezo": {"model": {"freeze": ["*norm*"]}},
    "addax": {"method": {"boundary": 28, "probes": 2}},
    "vamo_literal": {"method": {"probes": 2, "radius": 0.1, "snapshot": {"every": "2 steps"}}},
}
"""What a method needs, or should do in the test, beside its name."""

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw_lora": {"model": {"adapter": LORA}, "training": {"activation_checkpointing": True}},
    "vamo_recompute": {"method": {"name": "vamo", "source": "recompute", "difference": "forward", "eps": 0.001}},
    "mezo_forward": {"method": {"name": "mezo", "probes": 3, "difference": "forward"}},
    "mezo_bcd_probes": {"method": {"name": "mezo_bcd", "probes": 2, "directions": {"order": "flip_flop"}}},
    "mezo_streamed": {"method": {"name": "mezo"}, "training": {"stream_layers": True}},
}

CASES = {name: merged({"method": {"name": name}}, NEEDS.get(name, {})) for name in METHOD_NAMES} | VARIANTS

COMPLETION = 4
"""Tokens of either label below, so that no supervised position is padding."""

SETTING: dict[str, Any] = {
    "data": {"evaluation": None, "format": {"labels": {0: " bad", 1: " yes"}}},
    "optimizer": {"learning_rate": 1e-4},
    "training": {"steps": 3, "batch_size": 5, "micro_batch_size": 3, "forward_batch_tokens": 300},
    "evaluation": {"metrics": ["loss"]},
    "logging": {"every": "1 steps"},
}


class Count:
    """Counts what a model is asked for while steps are made."""

    def __init__(self) -> None:
        self.work = Work()
        self.reported = Work()
        self._open = False

    @contextmanager
    def during_a_step(self) -> Iterator[None]:
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def on_forward(self, model: nn.Module, arguments: object, keywords: dict[str, Tensor], output: Any) -> None:
        if not self._open:
            return
        passes = 1 if unpack_dual(output.logits).tangent is None else 2  # one over dual numbers counts as two
        rows, tokens = passes * len(keywords["input_ids"]), passes * int(keywords["attention_mask"].sum())
        supervised = rows * output.logits.shape[1]
        self.work += Work(forward_samples=rows, forward_tokens=tokens, forward_supervised=supervised)
        if output.logits.requires_grad:
            passed = Work(backward_samples=rows, backward_tokens=tokens, backward_supervised=supervised)
            output.logits.register_hook(lambda gradient: self.on_backward(passed))

    def on_backward(self, passed: Work) -> None:
        self.work += passed


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Watches the model of the next run, without the passes that only prove that streaming and reuse change nothing."""
    count, load, step = Count(), model.load_model, Trainer._step

    def watched_model(*arguments: Any, **keywords: Any) -> Any:
        loaded = load(*arguments, **keywords)
        loaded.model.register_forward_hook(count.on_forward, with_kwargs=True)
        return loaded

    def watched_step(self: Trainer) -> Any:
        with count.during_a_step():
            record = step(self)
        count.reported = self.state.work
        return record

    monkeypatch.setattr(model, "load_model", watched_model)
    monkeypatch.setattr(Trainer, "_step", watched_step)
    monkeypatch.setattr(Perturber, "checked", lambda self, evaluate, *, plain=None: evaluate())
    monkeypatch.setattr(PrefixReuse, "_compared", lambda self, reused, losses, support: reused[-1])
    return count


@pytest.mark.parametrize("name", CASES)
def test_a_method_reports_what_the_model_was_asked_for(name: str, workspace: Workspace, count: Count) -> None:
    workspace.configure(merged(SETTING, CASES[name]))
    assert workspace.train() == 0
    reported, work = count.reported.state_dict(), count.work.state_dict()
    del reported["reused_layer_tokens"], work["reused_layer_tokens"]
    assert reported == work
    line = workspace.metrics()[-1]
    assert {key: line[key] for key in ("forward_evals", "forward_tokens", "backward_evals", "backward_tokens")} == {
        "forward_evals": work["forward_samples"],
        "forward_tokens": work["forward_tokens"],
        "backward_evals": work["backward_samples"],
        "backward_tokens": work["backward_tokens"],
    }
    assert work["forward_supervised"] == COMPLETION * work["forward_samples"] > 0
    assert line["flops"] > 0


def test_layers_below_what_is_trained_are_not_paid_for_at_every_probe_point(workspace: Workspace, count: Count) -> None:
    """With the first layer frozen, the q further points of a sample begin at the second one."""
    method = {"name": "vamo_literal", "probes": 2, "radius": 0.1, "snapshot": {"every": "2 steps"}}
    workspace.configure(merged(SETTING, {"model": {"freeze": ["*embed*", "*layers.0.*"]}, "method": method}))
    assert workspace.train() == 0
    work = count.reported
    evaluated, rest = divmod(work.forward_tokens - work.backward_tokens, 2 + 1)  # all but the training passes
    assert rest == 0
    assert work.reused_layer_tokens == 2 * evaluated > 0
