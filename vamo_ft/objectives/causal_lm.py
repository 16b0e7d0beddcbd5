"""The next-token loss of a causal language model, with logits at supervised positions only.

Shapes: B rows, T input tokens, K kept positions, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms

__all__ = ["CausalLM"]


class CausalLM:
    """`L_i = - sum_{k supervised} log p(token_k | tokens before it)`, with t_i its supervised tokens.

    Batches carry `positions`, the union over the rows of the columns whose next token is supervised, and `tokens`,
    (B, K), that next token or -100. The root module is called once with `logits_to_keep=positions`, so that logits of
    the prompt never exist; a model without that argument gives full logits, from which the columns are taken.
    """

    def __init__(self, model: nn.Module, *, accepts_logits_to_keep: bool) -> None:
        self._model = model
        self._accepts_logits_to_keep = accepts_logits_to_keep

    @property
    def module(self) -> nn.Module:
        """The language model."""
        return self._model

    def terms(self, batch: Batch) -> LossTerms:
        """Summed cross-entropy of each row, in float32 or wider."""
        return LossTerms(-self.token_log_probs(batch).sum(1), batch.counts)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """The loss alone."""
        return EvaluationTerms(self.terms(batch))

    def token_log_probs(self, batch: Batch) -> Tensor:
        """(B, K) log-probability of each supervised token, 0 elsewhere."""
        tokens = batch.targets["tokens"]
        logits = self.logits(batch)
        return -cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=-100, reduction="none").view_as(
            tokens
        )

    def logits(self, batch: Batch) -> Tensor:
        """(B, K, V) logits at the kept positions, in float32 or wider."""
        positions = batch.targets["positions"]
        if self._accepts_logits_to_keep:
            logits: Tensor = self._model(**batch.inputs, logits_to_keep=positions).logits
        else:
            logits = self._model(**batch.inputs).logits.index_select(1, positions)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
