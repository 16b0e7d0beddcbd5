"""Compiles the layers of a model."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from vamo_ft.core.errors import UsageError
from vamo_ft.core.kernels import compiler_available, load_compiler
from vamo_ft.core.stack import replace_forward, stacked_layers

__all__ = ["compile_layers", "uncompiled"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_OPTIONS: dict[str, Any] = {"cpp.dynamic_threads": True}


def compile_layers(model: PreTrainedModel | PeftModel) -> None:
    """Lets `torch.compile` make the forward and backward pass of every layer of the model's stacks.

    The layers of a stack are alike and share what is compiled, so that it takes as long for many as for one. It is the
    layer's `forward` that is replaced, inside the module's call: hooks on the layer stay outside of what is compiled
    (within it they would be compiled with it, or be left out without a word), and so do the streamed perturbation and
    the reuse of earlier layers, which work with hooks and with `forward` itself. Names of parameters, and what is
    saved, do not change.

    Lengths are symbols from the first batch on, and the number of threads is not written into the code: what is
    compiled does not depend on which batch comes first, so that a resumed run computes what the run would have.

    Raises:
        UsageError: there is no compiler, or the model has no stack of layers.
    """
    device = next(model.parameters()).device.type
    if not compiler_available(device):
        needed = "a C++ compiler (g++, or what CXX names)" if device == "cpu" else "triton"
        raise UsageError(f"model.compile: needs {needed}, which is not here; install it, or leave model.compile out")
    layers = stacked_layers(model)
    if not layers:
        raise UsageError("model.compile: the model has no stack of layers to compile; leave it out")
    load_compiler()
    for layer in layers:
        replace_forward(layer, _CompiledForward(layer.forward))


@contextmanager
def uncompiled(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within the block compiled layers run as they were: token by token, every call would be another shape."""
    forwards = [(layer, vars(layer).get("forward")) for layer in stacked_layers(model)]
    compiled = [(layer, made) for layer, made in forwards if isinstance(made, _CompiledForward)]
    try:
        for layer, made in compiled:
            replace_forward(layer, made.plain)
        yield
    finally:
        for layer, made in compiled:
            replace_forward(layer, made)


class _CompiledForward(Generic[Arguments, Result]):
    """What was made of `plain`, with the compiler's failures in one line."""

    def __init__(self, plain: Callable[Arguments, Result]) -> None:
        self.plain = plain
        self._made: Callable[Arguments, Result] = torch.compile(plain, dynamic=True, options=_OPTIONS)
        functools.update_wrapper(self, plain)

    def __call__(self, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        from torch._dynamo.exc import TorchDynamoException

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                return self._made(*arguments, **keywords)  # which looks at the inputs' gradients while it compiles
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"model.compile: the compiler fails on this model: {reason}; leave it out") from error
