"""What flows through a training step.

Shapes: B samples in a batch, K kept positions, q probes (`num_probes`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.transfer import to_device


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples collated for one forward pass.

    Attributes:
        indices: stable index of each sample in its data set.
        inputs: keyword arguments of the model's forward pass, each (B, ...).
        targets: what the objective compares the output with; the keys are the objective's own.
        counts: (B,) float32, weight of each sample in the mean loss: its supervised tokens, or 1.
        num_tokens: input tokens without padding.
        num_supervised: those of them at which the loss needs the head's output.
        references: right answers of each sample as text, where they are not the supervised text alone.
    """

    indices: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    counts: Tensor
    num_tokens: int
    num_supervised: int = 0
    references: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy does not block."""
        return Batch(
            indices=self.indices,
            inputs={name: to_device(tensor, device) for name, tensor in self.inputs.items()},
            targets={name: to_device(tensor, device) for name, tensor in self.targets.items()},
            counts=to_device(self.counts, device),
            num_tokens=self.num_tokens,
            num_supervised=self.num_supervised,
            references=self.references,
        )


def total_count(batches: Iterable[Batch], device: torch.device) -> Tensor:
    """() float64 on `device`: the weight of all samples together."""
    return to_device(torch.cat([batch.counts for batch in batches]), device).double().sum()


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Per-sample sums; nothing is reduced here.

    Attributes:
        total: (B,) summed loss of each sample, float32 or wider.
        count: (B,) weight of each sample. The mean loss over any set of samples is `sum(total) / sum(count)`.
    """

    total: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True)
class EvaluationTerms:
    """What evaluation learns of each sample of a batch.

    Attributes:
        loss: summed losses and weights.
        scores: name -> (B,) float32 score of each sample, from 0 to 1, of which more is better: `accuracy` (1 where the
            predicted class is the right one), `exact_match`, `f1`, `rouge_l`.
        option_scores: (B, O) what decides between the options of a sample or the classes: mean log-probabilities of
            their tokens, or log-probabilities. -inf where a sample has fewer options than another.
        answers: generated texts.
    """

    loss: LossTerms
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    option_scores: Tensor | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed, in samples and in tokens (padding not counted).

    `Work.forward(batches) + Work.backward(batches)` is one pass of back-propagation over the batches.

    Attributes:
        forward_samples: samples of all forward passes.
        backward_samples: samples of all backward passes.
        forward_tokens: input tokens of all forward passes.
        backward_tokens: input tokens of all backward passes.
        forward_supervised: supervised tokens of all forward passes.
        backward_supervised: supervised tokens of all backward passes.
        reused_layer_tokens: layers times tokens, within `forward_tokens`, whose output was kept from an earlier pass.
    """

    forward_samples: int = 0
    backward_samples: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    forward_supervised: int = 0
    backward_supervised: int = 0
    reused_layer_tokens: int = 0

    @classmethod
    def forward(cls, batches: Iterable[Batch], *, times: int = 1) -> "Work":
        """`times` forward passes over each of the batches."""
        samples, tokens, supervised = _sizes(batches)
        return cls(
            forward_samples=times * samples, forward_tokens=times * tokens, forward_supervised=times * supervised
        )

    @classmethod
    def backward(cls, batches: Iterable[Batch], *, times: int = 1) -> "Work":
        """`times` backward passes over each of the batches, without the forward passes that they follow."""
        samples, tokens, supervised = _sizes(batches)
        return cls(
            backward_samples=times * samples, backward_tokens=times * tokens, backward_supervised=times * supervised
        )

    def __add__(self, other: "Work") -> "Work":
        mine, others = self.state_dict(), other.state_dict()
        return Work(**{name: count + others[name] for name, count in mine.items()})

    def state_dict(self) -> dict[str, int]:
        """All counts."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int]) -> "Work":
        """Restores `state_dict`."""
        return cls(**state)


def _sizes(batches: Iterable[Batch]) -> tuple[int, int, int]:
    """Samples, tokens and supervised tokens of all batches."""
    sizes = [(len(batch), batch.num_tokens, batch.num_supervised) for batch in batches]
    return sum(size[0] for size in sizes), sum(size[1] for size in sizes), sum(size[2] for size in sizes)


@dataclass(frozen=True, slots=True)
class ProjectedGradient:
    """The gradient estimate `sum_j coefficients[j] * z(keys[j])`, never formed as a dense vector.

    Attributes:
        coefficients: (m,) on the parameters' device.
        keys: the m directions.
    """

    coefficients: Tensor
    keys: tuple[HashKey, ...]


@dataclass(frozen=True, slots=True)
class ProjectedUpdate:
    """One step of plain SGD along directions, as it was made: all that is needed to make it again.

    Attributes:
        step: number of the update, counted from 0.
        learning_rate: of this update.
        gradient: what was followed, after clipping.
    """

    step: int
    learning_rate: float
    gradient: ProjectedGradient


@dataclass(frozen=True, slots=True)
class Estimate:
    """One step's gradient estimate.

    Attributes:
        loss: (), mean loss over the step's samples, float64.
        projected: the estimate as coefficients; None when it was accumulated into `.grad`.
        work: what the estimate cost.
        metrics: the method's own figures, logged under `method.*`.
    """

    loss: Tensor
    work: Work
    projected: ProjectedGradient | None = None
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
