"""Classification: by label words after a prompt, or by a classifier head.

Shapes: B samples, O options (classes), R rows, K kept positions, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms
from vamo_ft.objectives.causal_lm import CausalLM

__all__ = ["SequenceClassification", "VerbaliserClassification"]


class VerbaliserClassification:
    """Trains on the label word as text; classifies by the option of the highest mean token log-probability.

    Evaluation batches hold either prompts alone with the options' single tokens (`option_tokens`, (O,)), so that one
    forward pass scores all options, or every option of a sample after its prompt in a row of its own: B * O rows, or,
    where samples have options of their own, R rows that `option_rows` (B, O) tells (-1: no such option). `option_right`
    (B, O) then says which options are right; otherwise it is the label alone.
    """

    def __init__(self, language_model: CausalLM) -> None:
        self._language_model = language_model

    @property
    def module(self) -> nn.Module:
        """The language model."""
        return self._language_model.module

    def terms(self, batch: Batch) -> LossTerms:
        """The causal loss of the right label's tokens."""
        return self._language_model.terms(batch)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """The causal loss of the option that is learnt, and whether a right one scores highest."""
        label = batch.targets["label"]  # (B,)
        rows = batch.targets.get("option_rows")  # (B, O) or None
        if "option_tokens" in batch.targets:
            log_probs = self._language_model.logits(batch)[:, 0].log_softmax(-1)  # (B, V)
            sums = scores = log_probs[:, batch.targets["option_tokens"]]  # (B, O)
        else:
            row_sums = self._language_model.token_log_probs(batch).sum(1)  # (R,)
            row_means = row_sums / (batch.targets["tokens"] != -100).sum(1)
            if rows is None:
                rows = torch.arange(len(row_sums), device=label.device).view(len(label), -1)
            sums, scores = row_sums[rows], row_means[rows].masked_fill(rows < 0, -torch.inf)  # (B, O)
        total = -sums.gather(1, label.unsqueeze(1)).squeeze(1)
        accuracy = _accuracy(scores, label, right=batch.targets.get("option_right"))
        return EvaluationTerms(LossTerms(total, batch.counts), accuracy, option_scores=scores)


class SequenceClassification:
    """`L_i = - log p(class_i)` from the logits of a classifier head; every sample weighs 1."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def module(self) -> nn.Module:
        """The model with its head."""
        return self._model

    def terms(self, batch: Batch) -> LossTerms:
        """Cross-entropy of each sample, in float32 or wider."""
        return self._terms(self._logits(batch), batch)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """The loss, and whether the largest logit is the right one."""
        logits = self._logits(batch)
        accuracy = _accuracy(logits, batch.targets["label"])
        return EvaluationTerms(self._terms(logits, batch), accuracy, option_scores=logits.log_softmax(-1))

    def _logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self._model(**batch.inputs).logits  # (B, O)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def _terms(logits: Tensor, batch: Batch) -> LossTerms:
        return LossTerms(cross_entropy(logits, batch.targets["label"], reduction="none"), batch.counts)


def _accuracy(scores: Tensor, label: Tensor, *, right: Tensor | None = None) -> dict[str, Tensor]:
    """Whether the class of the highest score, (B, O), is a right one; NaN where a score is, which is no answer.

    Args:
        right: (B, O) the right ones; None: the label alone.
    """
    chosen = scores.argmax(1)  # (B,)
    hit = chosen == label if right is None else right.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return {"accuracy": torch.where(scores.isnan().any(1), torch.nan, hit.float())}
