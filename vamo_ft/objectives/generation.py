"""Scores of generated answers.

Shapes: B samples, P prompt tokens, N new tokens, A tokens of a right answer.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vamo_ft.core.memory import memory_explained
from vamo_ft.core.scores import best_score
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
    """`s_i = max_r score(answer generated for prompt_i, reference_r)`, by name.

    Batches carry `prompt_ids` and `prompt_mask`, (B, P), and the completions as `answer_ids`, (B, A), padded with -100.
    The references of a sample are its texts in `Batch.references` or, where it has none, its completion, decoded as the
    answer is.
    """

    def __init__(self, *, generate: Generate, decode: Decode, scores: Mapping[str, Score]) -> None:
        self._generate = generate
        self._decode = decode
        self._scores = scores

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """(B,) float32 of each score."""
        return self.scores(batch, self.answers(batch))

    def answers(self, batch: Batch) -> tuple[str, ...]:
        """The text that is generated for each prompt."""
        ids = batch.targets["prompt_ids"]  # (B, P)
        with memory_explained(
            f"the generation of answers (a batch of {len(ids)} prompts of up to {ids.shape[1]} tokens)",
            remedy="lower max_new_tokens, training.forward_batch_tokens or data.max_length",
        ):
            generated = self._generate(ids, batch.targets["prompt_mask"])  # (B, N)
        return tuple(self._decode(generated.tolist()))

    def scores(self, batch: Batch, answers: Sequence[str]) -> dict[str, Tensor]:
        """(B,) float32 of each score of given answers."""
        completions = [[token for token in row if token != -100] for row in batch.targets["answer_ids"].tolist()]
        learnt = [(text,) for text in self._decode(completions)]
        references = [named or completion for named, completion in zip(batch.references or learnt, learnt, strict=True)]
        return {
            name: torch.tensor(
                [best_score(score, *pair) for pair in zip(answers, references, strict=True)],
                dtype=torch.float32,
                device=batch.counts.device,
            )
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
        answers = self._answer_scores.answers(batch)
        return EvaluationTerms(self.terms(batch), self._answer_scores.scores(batch, answers), answers=answers)
