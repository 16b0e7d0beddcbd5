"""What evaluations cost in floating-point operations."""

from dataclasses import dataclass

from torch import nn

from vamo_ft.core.types import Work

__all__ = ["Ledger"]


@dataclass(frozen=True, slots=True)
class Ledger:
    """FLOPs of forward and backward passes: two per parameter and token, per product with a weight matrix.

    A forward pass costs 2N a token, a backward pass 2N for the activations' gradients and 2T for the weights', with N
    the matrix parameters and T the trainable ones among them (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    Attention scores, recomputed activations and the logits saved at unsupervised positions are left out.
    """

    num_parameters: int
    num_trainable: int

    @classmethod
    def of(cls, module: nn.Module) -> "Ledger":
        """Counts a module's matrices, tied ones once and untied input embeddings not at all (they are looked up)."""
        looked_up, head = (
            getattr(getattr(module, getter, lambda: None)(), "weight", None)
            for getter in ("get_input_embeddings", "get_output_embeddings")
        )
        tied = looked_up is head
        matrices = [p for p in module.parameters() if p.ndim >= 2 and (tied or p is not looked_up)]
        return cls(sum(p.numel() for p in matrices), sum(p.numel() for p in matrices if p.requires_grad))

    def flops(self, work: Work) -> int:
        """Floating-point operations of `work`."""
        forward = 2 * self.num_parameters * work.forward_tokens
        return forward + 2 * (self.num_parameters + self.num_trainable) * work.backward_tokens
