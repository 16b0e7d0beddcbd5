"""A model of a few numbers in the place of a large one, for what depends on data and method alone: evaluations."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vamo_ft.assemble.directions import build_directions
from vamo_ft.assemble.parts import Parts
from vamo_ft.config.method import AddaxConfig, ForwardGradientConfig, SpsaConfig, VamoConfig, ZoSvrgConfig
from vamo_ft.config.optimizer import RULES
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.blocks import model_blocks
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.stack import layer_stacks
from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms

__all__ = ["stand_in"]

_ELEMENTS = 64  # of each part: more than any method has probes along gradients


class _Part(nn.Module):
    """Adds the mean of its own values."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(0.5, 1.0, _ELEMENTS, dtype=torch.float64), requires_grad=trained)

    def forward(self, total: Tensor) -> Tensor:
        """() -> ()."""
        return total + (self.values * self.values).mean()


class _Stack(nn.Module):
    """Parts before the layers, the layers, and parts after them, run in this order."""

    def __init__(self, before: Sequence[bool], layers: Sequence[bool], after: Sequence[bool]) -> None:
        super().__init__()
        self.before = nn.Sequential(*[_Part(trained=each) for each in before])
        self.layers = nn.ModuleList([_Part(trained=each) for each in layers])
        self.after = nn.Sequential(*[_Part(trained=each) for each in after])

    def forward(self, total: Tensor) -> Tensor:
        """() -> ()."""
        total = self.before(total)
        for layer in self.layers:
            total = layer(total)
        total = self.after(total)
        return total


class _Losses:
    """A loss that depends on every value and on the sample's weight (a `core.protocols.Objective`)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def terms(self, batch: Batch) -> LossTerms:
        """Per-sample losses."""
        value = self.module(torch.zeros((), dtype=torch.float64))
        offset = torch.tensor([1.0 + index % 7 for index in batch.indices], dtype=torch.float64)
        return LossTerms(value * offset * batch.counts, batch.counts)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """The loss alone."""
        return EvaluationTerms(self.terms(batch))


def stand_in(config: RunConfig, parts: Parts) -> tuple[RunConfig, Parts]:
    """A configuration and parts with which a run spends what it would with `parts`, an outline.

    Evaluations follow from the data, the order of steps and the method. Where steps take one block each, the stand-in
    has the model's blocks, so that as many layers are reused.
    """
    method = config.method
    module = _module(parts, layered=config.method.structure == "block")
    parameters = TrainableParameters(module)
    optimizer = {"name": RULES[config.optimizer.name], "master_weights": False}
    changes = {
        "model": config.model.model_copy(update={"dtype": "float32", "adapter": None}),
        "optimizer": config.optimizer.model_copy(update=optimizer),
    }
    if isinstance(method, SpsaConfig | AddaxConfig | ForwardGradientConfig | ZoSvrgConfig | VamoConfig) and (
        method.directions.structure not in ("full", "block", "gradient_subspace")
    ):
        full = type(method.directions)(distribution="rademacher")  # which coordinates are displaced costs nothing
        changes["method"] = method.model_copy(update={"directions": full})
    changes["training"] = config.training.model_copy(update={"micro_batch_size": None, "autocast": None})
    config = config.model_copy(update=changes)
    changed = replace(
        parts,
        runtime=LocalRuntime(),
        objective=_Losses(module),
        parameters=parameters,
        directions=build_directions(config, parameters, module),
    )
    return config, changed


def _module(parts: Parts, *, layered: bool) -> nn.Module:
    """As many blocks as the model has, before, in and after its layers; a single part where they do not matter."""
    if not layered:
        return _Stack([True], [], [])
    model = parts.loaded.model
    stacks = layer_stacks(model)
    layers = [layer for stack in stacks for layer in stack]
    number_of = {id(p): number for number, layer in enumerate(layers) for p in layer.parameters()}
    trained = [False] * len(layers)
    before: list[bool] = []
    after: list[bool] = []
    seen = False
    for block in model_blocks(model, parts.parameters):
        number = number_of.get(id(parts.parameters.tensors[block.indices[0]]))
        if number is not None:
            trained[number] = seen = True
        else:
            (after if seen else before).append(True)
    if len(stacks) != 1:  # then no layer is ever reused
        return _Stack([True] * len(model_blocks(model, parts.parameters)), [], [])
    return _Stack(before, trained, after)
