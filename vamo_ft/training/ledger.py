"""What a run has spent, in one currency for all methods."""

import resource
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import mode

import torch

from vamo_ft.core.types import Work
from vamo_ft.training.matrices import MatrixProduct

__all__ = ["Ledger", "peak_memory_bytes", "reset_peak_memory"]


@dataclass(frozen=True, slots=True)
class Ledger:
    """Turns evaluations into floating-point operations, and both, with time and memory, into figures.

    A product `y = x W` with a matrix of N elements costs, for each row of x,

        2 N  forward
        2 N  backward, where x depends on something trained: below the lowest trained matrix no gradient is formed
        2 N  backward, where W is trained
        2 N  backward, where activation checkpointing forms it again (see `MatrixProduct.recomputed`)

    (the counts of Kaplan et al. 2020, arXiv 2001.08361, section 2.1, made for each matrix). The rows are the tokens;
    for matrices outside the layers that are not applied to every token, such as a head with `logits_to_keep`, a pooler
    and what follows it, they are the supervised tokens, or the samples of a classifier. Tokens that take a layer's
    output from an earlier pass do not pay for the layer.

    Left out are padding; everything that is not the product with a weight matrix, such as attention scores, norms,
    losses, perturbations, corrections and updates; and passes that only prove something and are made again after a
    resume (that streaming or reusing layers changes no bit; which products a pass consists of). Not exact are layers of
    different size that are reused (their mean counts), stacked experts (all count for every token), the backward passes
    of a search for eps and at svrg's snapshots under activation checkpointing (they do not recompute), and answers that
    are generated (they count as one pass over prompt and reference).

    Attributes:
        forward, forward_supervised: operations of a forward pass for each token, and for each supervised one.
        backward, backward_supervised: of a backward pass.
        layer: of a forward pass through one layer, for each token.
    """

    forward: int
    forward_supervised: int
    backward: int
    backward_supervised: int
    layer: Fraction

    @classmethod
    def of(cls, products: Sequence[MatrixProduct], *, activation_checkpointing: bool) -> "Ledger":
        """The prices of a model.

        Args:
            products: of a pass over samples with more tokens than supervised ones; without padding.
        """
        tokens = mode(product.vectors for product in products) if products else 0
        in_layers = [product for product in products if product.layer is not None]
        everywhere = [product for product in products if product.layer is not None or product.vectors >= tokens]
        supervised = [product for product in products if product.layer is None and product.vectors < tokens]
        num_layers = len({product.layer for product in in_layers})
        return cls(
            forward=_forward(everywhere),
            forward_supervised=_forward(supervised),
            backward=_backward(everywhere, activation_checkpointing=activation_checkpointing),
            backward_supervised=_backward(supervised, activation_checkpointing=activation_checkpointing),
            layer=Fraction(_forward(in_layers), max(1, num_layers)),
        )

    def flops(self, work: Work) -> int:
        """Floating-point operations of `work`."""
        return (
            self.forward * work.forward_tokens
            + self.forward_supervised * work.forward_supervised
            + self.backward * work.backward_tokens
            + self.backward_supervised * work.backward_supervised
            - round(self.layer * work.reused_layer_tokens)
        )

    def figures(self, work: Work, *, seconds: float) -> dict[str, int | float]:
        """What a line of metrics says of the work so far, of the seconds that it took, and of memory (bytes)."""
        return {
            "forward_evals": work.forward_samples,
            "backward_evals": work.backward_samples,
            "forward_tokens": work.forward_tokens,
            "backward_tokens": work.backward_tokens,
            "flops": self.flops(work),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def peak_memory_bytes() -> int:
    """Largest memory so far: allocated on the CUDA device, or the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Begins `peak_memory_bytes` anew at what is held now, where the system allows it (CUDA, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)


def _forward(products: Iterable[MatrixProduct]) -> int:
    return sum(2 * product.elements for product in products)


def _backward(products: Iterable[MatrixProduct], *, activation_checkpointing: bool) -> int:
    return sum(
        2 * product.elements * (product.carries + product.trained + (activation_checkpointing and product.recomputed))
        for product in products
    )
