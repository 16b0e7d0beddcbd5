"""Which matrix products the passes through a model consist of, seen in one forward pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import num_weights
from vamo_ft.core.protocols import Objective, Runtime
from vamo_ft.core.runtime import seeded_generator
from vamo_ft.core.stack import stacked_layers
from vamo_ft.core.types import Batch

__all__ = ["MatrixProduct", "matrix_products"]


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """`y = x W` by one module, and what autograd makes of it.

    Attributes:
        elements: of W.
        vectors: rows of x, in the pass that was watched.
        layer: the number of the layer that the module is part of, or None.
        trained: W gets a gradient, `x^T dy`.
        carries: x gets one, `dy W^T`: something that x depends on is trained.
        recomputed: with activation checkpointing of the layers the product is formed again in the backward pass. That
            stops at the last tensor that autograd has to save in a layer, and a product saves its operands before it is
            formed, so that one at the layer's end is not repeated.
    """

    elements: int
    vectors: int
    layer: int | None
    trained: bool
    carries: bool
    recomputed: bool = False


def matrix_products(objective: Objective, batch: Batch, *, runtime: Runtime) -> tuple[MatrixProduct, ...]:
    """The products of one forward pass of the objective's module over `batch`, in the order of their modules' ends.

    The pass is one of training, with dropout, and keeps no activations; parameters and random state stay as they are.
    A product is a module with matrices of its own that is not an embedding, which is looked up. A matrix that a module
    reads from another one is not seen.

    Args:
        batch: as for `Objective.terms`; one sample will do.
    """
    watch = _Watch(objective.module)
    objective.module.train()
    with (
        watch.watching(),
        saved_tensors_hooks(watch.on_saved, _never),
        seeded_generator(HashKey(0, Domain.DROPOUT, 0, 0), runtime.device),
        runtime.autocast(),
    ):
        objective.terms(batch.to(runtime.device))
    return tuple(watch.products)


class _Watch:
    """Follows a forward pass from module to module."""

    def __init__(self, module: nn.Module) -> None:
        self.products: list[MatrixProduct] = []
        self._layers = stacked_layers(module)
        self._matrices = {
            part: matrices
            for part in module.modules()
            if not isinstance(part, nn.Embedding)
            and (matrices := [p for p in part.parameters(recurse=False) if p.ndim >= 2])
        }
        self._layer: int | None = None
        self._first = 0  # product of the present layer
        self._saved_after = 0  # products, when autograd last saved a tensor in the present layer

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            for number, layer in enumerate(self._layers):
                handles.append(layer.register_forward_pre_hook(self._on_entry(number)))
                handles.append(layer.register_forward_hook(self._on_exit))
            for module, matrices in self._matrices.items():
                handles.append(module.register_forward_hook(self._on_product(matrices), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def on_saved(self, tensor: Tensor) -> None:
        """Autograd saves a tensor; nothing is kept, since there will be no backward pass."""
        self._saved_after = len(self.products)

    def _on_entry(self, number: int) -> Callable[[nn.Module, object], None]:
        def enter(layer: nn.Module, arguments: object) -> None:
            self._layer = number
            self._first = self._saved_after = len(self.products)

        return enter

    def _on_exit(self, layer: nn.Module, arguments: object, output: object) -> None:
        repeated = slice(self._first, self._saved_after)
        self.products[repeated] = [replace(product, recomputed=True) for product in self.products[repeated]]
        self._layer = None

    def _on_product(self, matrices: Sequence[Tensor]) -> Callable[..., None]:
        def note(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: object) -> None:
            inputs = (value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor))
            tensors = [value for value in inputs if value.is_floating_point() and value.ndim > 0]
            if not tensors:  # numbers of rows are looked up, not multiplied
                return
            self.products.append(
                MatrixProduct(
                    elements=sum(map(num_weights, matrices)),
                    vectors=tensors[0].numel() // tensors[0].shape[-1],
                    layer=self._layer,
                    trained=any(matrix.requires_grad for matrix in matrices),
                    carries=any(tensor.requires_grad for tensor in tensors),
                )
            )

        return note


def _never(saved: object) -> Tensor:
    raise AssertionError("a watched pass is not followed by a backward pass")
