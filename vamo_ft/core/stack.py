"""Which part of a model a parameter belongs to: a layer of a stack, or something around it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from torch import nn

__all__ = [
    "Owners",
    "Replay",
    "layer_stacks",
    "owners_of",
    "replace_forward",
    "replays",
    "restore_forward",
    "stacked_layers",
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Owners:
    """Where one parameter tensor is used.

    Attributes:
        layers: numbers in `stacked_layers` of the layers that hold it.
        outside: modules outside the layers that hold it as an attribute of their own.
    """

    layers: tuple[int, ...]
    outside: tuple[nn.Module, ...]


def layer_stacks(module: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """The outermost `ModuleList`s of at least two modules, such as the decoder layers of a language model."""
    return tuple(_stacks(module))


def stacked_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of all stacks in one row."""
    return [layer for stack in layer_stacks(module) for layer in stack]


def owners_of(module: nn.Module, tensors: Sequence[nn.Parameter]) -> tuple[Owners, ...]:
    """The owners of each of these parameters of the module; a tied one can have several."""
    layers = stacked_layers(module)
    inside = {id(part) for layer in layers for part in layer.modules()}
    by_layer: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            by_layer.setdefault(id(parameter), []).append(number)
    by_module: dict[int, list[nn.Module]] = {}
    for part in module.modules():
        if id(part) not in inside:
            for parameter in part.parameters(recurse=False):
                by_module.setdefault(id(parameter), []).append(part)
    return tuple(
        Owners(tuple(by_layer.get(id(tensor), ())), tuple(by_module.get(id(tensor), ()))) for tensor in tensors
    )


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Lets one module compute something else."""
    module.__dict__["forward"] = forward


def restore_forward(module: nn.Module, previous: Callable[..., Any] | None) -> None:
    """Undoes `replace_forward`; `previous` is what `vars(module)` held before, if anything."""
    if previous is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = previous


class Replay(Generic[Arguments, Result]):
    """Stands in the place of a layer's `forward`, is called as that, reads no weight, and returns a known value."""

    def __init__(self, value: Result, *, like: Callable[Arguments, Result]) -> None:
        self._value = value

    def __call__(self, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        """The value."""
        return self._value


def replays(module: nn.Module) -> bool:
    """Whether a `Replay` stands in the place of the module's `forward`."""
    return isinstance(vars(module).get("forward"), Replay)


def _stacks(module: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield tuple(child)
        else:
            yield from _stacks(child)
