"""Scores of generated answers.

Shapes: B samples, P prompt tokens, N new tokens, A tokens of a right answer.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vamo_ft.core.types import Batch, EvaluationTerms, LossTerms
from vamo_ft.objectives.causal_lm import CausalLM

__all__ = ["AnswerScores", "AnsweringLM"]

Generate = Callable[[Tensor, Tensor], Tensor]
"""Prompts and their mask, both (B, P) and padded on the left -> (B, N) new tokens."""

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Rows of tokens -> their texts, without special tokens."""

Score = Callable[[str, str], float]
"""An answer and its reference -> from 0 to 1."""


class AnswerScores:
    """`s_i = score(answer generated for prompt_i, completion_i)`, by name.

    Batches carry `prompt_ids` and `prompt_mask`, (B, P), and the completions as `answer_ids`, (B, A), padded with -100.
    Both texts are decoded in the same way.
    """

    def __init__(self, *, generate: Generate, decode: Decode, scores: Mapping[str, Score]) -> None:
        self._generate = generate
        self._decode = decode
        self._scores = scores

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """(B,) float32 of each score."""
        generated = self._generate(batch.targets["prompt_ids"], batch.targets["prompt_mask"])  # (B, N)
        answers = self._decode(generated.tolist())
        completions = [[token for token in row if token != -100] for row in batch.targets["answer_ids"].tolist()]
        pairs = list(zip(answers, self._decode(completions), strict=True))
        return {
            name: torch.tensor([score(*pair) for pair in pairs], dtype=torch.float32, device=generated.device)
            for name, score in self._scores.items()
        }


class AnsweringLM:
    """The causal language model's loss; evaluation also generates answers and scores them."""

    def __init__(self, language_model: CausalLM, answer_scores: AnswerScores) -> None:
        self._language_model = language_model
        self._answer_scores = answer_scores

    @property
    def module(self) -> nn.Module:
        """The language model."""
        return self._language_model.module

    def terms(self, batch: Batch) -> LossTerms:
        """The causal loss of the completion."""
        return self._language_model.terms(batch)

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """The causal loss of the completion, and the scores of the answers."""
        return EvaluationTerms(self.terms(batch), self._answer_scores(batch))
