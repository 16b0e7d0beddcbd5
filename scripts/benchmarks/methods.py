"""vamo-ft's own methods, built from a configuration as a run builds them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from scripts.benchmarks.results import NotAvailable
from scripts.benchmarks.setting import RandomSamples, Setting
from vamo_ft.assemble.directions import build_directions
from vamo_ft.assemble.method import build_estimator, build_update_rule
from vamo_ft.assemble.surroundings import Surroundings
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import GradientEstimator, Objective, ProgressTask, UpdateRule
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Batch
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.models.adapters import add_adapter
from vamo_ft.models.export import quietly
from vamo_ft.objectives.causal_lm import CausalLM

__all__ = [
    "ADAMW",
    "EPS",
    "LEARNING_RATE",
    "VAMO_LORA",
    "Ours",
    "Values",
    "build_ours",
    "mean_loss",
    "objective_of",
    "spsa",
]

EPS = 1e-3
LEARNING_RATE = 1e-7

Values = Mapping[str, Any]

ADAMW: Values = {
    "method": {"name": "adamw"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-5},
    "training": {"max_grad_norm": 1.0},
}
VAMO_LORA: Values = {
    "method": {"name": "vamo", "eps": EPS, "snapshot": {"every": "1 step"}},
    "optimizer": {"name": "sgd", "learning_rate": LEARNING_RATE},
    "model": {"adapter": {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}},
}


def spsa(*, distribution: str = "rademacher", structure: str = "full") -> Values:
    """MeZO's step: one probe, central difference, plain SGD along the projected gradient."""
    directions = {"distribution": distribution, "structure": structure}
    return {
        "method": {"name": "spsa", "probes": 1, "eps": EPS, "difference": "central", "directions": directions},
        "optimizer": {"name": "sgd", "learning_rate": LEARNING_RATE},
    }


@dataclass
class Ours:
    """A method, ready to step.

    Attributes:
        config: what it was built from.
        module: the model, with its adapter if there is one.
        step_number: steps done, which key the directions.
    """

    config: RunConfig
    module: nn.Module
    objective: Objective
    estimator: GradientEstimator
    update_rule: UpdateRule
    step_number: int = field(default=0)

    def step(self, micro_batches: Sequence[Batch]) -> float:
        """One step as the training loop makes it; returns the loss."""
        estimate = self.estimator.estimate(micro_batches, self.step_number)
        loss = float(estimate.loss)
        self.update_rule.apply(estimate, learning_rate=self.config.optimizer.learning_rate, step=self.step_number)
        self.step_number += 1
        return loss


def build_ours(
    values: Values, model: nn.Module, samples: RandomSamples, setting: Setting, *, dtype: str = "float32"
) -> Ours:
    """The objects of a run with this configuration, over `model`.

    Args:
        values: what differs from a plain run, as in the YAML file.
        model: trained in place; an adapter is put around it.

    Raises:
        NotAvailable: the configuration has no such method, or no such value.
    """
    config = _config(values, setting, dtype=dtype)
    with quietly():
        module = add_adapter(cast(Any, model), config.model) if config.model.adapter is not None else model
    objective, parameters = objective_of(module), TrainableParameters(module)
    runtime = LocalRuntime(setting.device)
    directions = build_directions(config, parameters, module)
    source = cast(TrainingSamples, samples)  # has all that estimators and periods ask of one
    surroundings = Surroundings(progress=_Silent(), stop_requested=lambda: False)
    return Ours(
        config=config,
        module=module,
        objective=objective,
        estimator=build_estimator(config, objective, parameters, directions, runtime, source, surroundings),
        update_rule=build_update_rule(config, parameters, directions),
    )


def objective_of(module: nn.Module) -> CausalLM:
    """vamo-ft's causal-LM loss, with logits at the supervised positions only."""
    return CausalLM(module, accepts_logits_to_keep=True)


@torch.no_grad()
def mean_loss(objective: Objective, batch: Batch) -> Tensor:
    """() the mean loss per supervised token: a bare forward pass."""
    terms = objective.terms(batch)
    return terms.total.sum() / terms.count.sum()


def _config(values: Values, setting: Setting, *, dtype: str) -> RunConfig:
    unused = {"train": {"path": "unused"}, "format": {"type": "prompt_completion"}}
    tokens = setting.batch * setting.length
    raw = {
        **values,
        "run": {"name": "bench", "offline": True},
        "model": {"path": setting.model, "dtype": dtype, **values.get("model", {})},
        "data": unused,
        "training": {
            "steps": 1,
            "batch_size": setting.batch,
            "forward_batch_tokens": tokens,
            **values.get("training", {}),
        },
    }
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise NotAvailable(f"not available: {place} = {first['input']!r}: {first['msg']}") from None


class _Silent:
    """Shows nothing; a `core.protocols.Progress` and its task."""

    @contextmanager
    def task(self, description: str, total: int, *, done: int = 0) -> Iterator[ProgressTask]:
        yield self

    def advance(self, amount: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass
