"""What flows through a training step.

Shapes: B samples in a batch, K kept positions, q probes (`num_probes`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples collated for one forward pass.

    Attributes:
        indices: stable index of each sample in its data set.
        inputs: keyword arguments of the model's forward pass, each (B, ...).
        targets: what the objective compares the output with; the keys are the objective's own.
        counts: (B,) float32, weight of each sample in the mean loss: its supervised tokens, or 1.
        num_tokens: input tokens without padding.
    """

    indices: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    counts: Tensor
    num_tokens: int

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy does not block."""
        return Batch(
            indices=self.indices,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            targets={name: tensor.to(device, non_blocking=True) for name, tensor in self.targets.items()},
            counts=self.counts.to(device, non_blocking=True),
            num_tokens=self.num_tokens,
        )


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
            predicted class is the right one), `exact_match`, `f1`.
    """

    loss: LossTerms
    scores: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed, in samples and in tokens (padding not counted)."""

    forward_samples: int = 0
    backward_samples: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward_samples + other.forward_samples,
            self.backward_samples + other.backward_samples,
            self.forward_tokens + other.forward_tokens,
            self.backward_tokens + other.backward_tokens,
        )

    def state_dict(self) -> dict[str, int]:
        """All counts."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int]) -> "Work":
        """Restores `state_dict`."""
        return cls(**state)


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
