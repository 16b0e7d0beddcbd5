"""The problems of the paper's experiments.

Shapes: n samples, d features.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.config.paper import DigitsConfig, LeastSquaresConfig, ProblemConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.protocols import Objective
from vamo_ft.core.runtime import seeded_generator
from vamo_ft.core.types import Batch
from vamo_ft.data.order import SampleOrder
from vamo_ft.objectives.classification import SequenceClassification
from vamo_ft.objectives.synthetic import MlpClassifier, NonconvexLeastSquares

__all__ = ["Problem", "TensorSamples", "build_problem", "digits_problem"]

_DTYPE = torch.float64  # so that rounding plays no part in the comparison
_DATA, _START = 0, 1  # what the random numbers of a problem's seed are for


class TensorSamples:
    """Samples that are rows of tensors, each of one token and of weight 1 (implements SampleSource).

    Args:
        features: (n, d).
        targets: (n,) under the name that the objective looks for.
        batch_size: samples of one step.
        seed: of the order in which steps take them.
    """

    def __init__(self, features: Tensor, targets: dict[str, Tensor], *, batch_size: int, seed: int) -> None:
        self._features = features
        self._targets = targets
        self._batch_size = batch_size
        self._order = SampleOrder(len(features), batch_size=batch_size, seed=seed)

    @property
    def num_samples(self) -> int:
        """The number of samples, n."""
        return len(self._features)

    @property
    def samples_per_epoch(self) -> int:
        """All of them."""
        return self._order.samples_per_epoch

    @property
    def batch_size(self) -> int:
        """Samples of one training step."""
        return self._batch_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all values."""
        digest = hashlib.sha256()
        for tensor in (self._features, *self._targets.values()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order."""
        rows = torch.tensor(indices)
        return Batch(
            indices=tuple(indices),
            inputs={"features": self._features[rows]},
            targets={name: tensor[rows] for name, tensor in self._targets.items()},
            counts=torch.ones(len(indices)),
            num_tokens=len(indices),
        )

    def length(self, index: int) -> int:
        """One token."""
        return 1

    def frequency(self, index: int) -> float:
        """1: each as often as any other."""
        return self._order.frequency(index)

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """`indices` in parts of at most `token_budget` samples."""
        return [tuple(indices[start : start + token_budget]) for start in range(0, len(indices), token_budget)]

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of step `step`, counted from 0: a permutation for each epoch, running on across epochs."""
        return self._order.step_indices(step)

    def batches(self, *, token_budget: int) -> Iterator[Batch]:
        """All samples in forward-only batches."""
        for group in self.groups(range(self.num_samples), token_budget=token_budget):
            yield self.batch(group)


@dataclass(frozen=True, slots=True)
class Problem:
    """Data that all runs share, and a starting point for each seed.

    Attributes:
        features: (n, d).
        targets: (n,) by the objective's name for them.
        objective: seed -> the loss at that seed's starting point.
    """

    features: Tensor
    targets: dict[str, Tensor]
    objective: Callable[[int], Objective]

    def samples(self, *, batch_size: int, seed: int) -> TensorSamples:
        """The data in the order of `seed`."""
        return TensorSamples(self.features, self.targets, batch_size=batch_size, seed=seed)


def build_problem(config: ProblemConfig) -> Problem:
    """Draws or loads the data.

    Raises:
        UsageError: scikit-learn, which the digits come with, is not installed.
    """
    match config:
        case LeastSquaresConfig():
            return _least_squares(config)
        case DigitsConfig():
            return digits_problem(*_load_digits(), hidden=config.hidden)


def _least_squares(config: LeastSquaresConfig) -> Problem:
    """`a_i ~ N(0, I)`, `y_i = [a_i . x* > 0]` but for the flipped ones, `x* ~ N(0, I)`; starts at `x ~ N(0, I / d)`."""
    cpu = torch.device("cpu")
    with seeded_generator(HashKey(config.seed, Domain.PROBLEM, 0, _DATA), cpu):
        features = torch.randn(config.samples, config.dimension, dtype=_DTYPE)
        labels = features @ torch.randn(config.dimension, dtype=_DTYPE) > 0
        labels ^= torch.rand(config.samples, dtype=_DTYPE) < config.flipped

    def objective(seed: int) -> NonconvexLeastSquares:
        with seeded_generator(HashKey(seed, Domain.PROBLEM, 0, _START), cpu):
            return NonconvexLeastSquares(torch.randn(config.dimension, dtype=_DTYPE) / config.dimension**0.5)

    return Problem(features, {"targets": labels.to(_DTYPE)}, objective)


def digits_problem(images: Tensor, digits: Tensor, *, hidden: int) -> Problem:
    """Cross-entropy of a network with one hidden layer.

    Args:
        images: (n, pixels).
        digits: (n,) int64, from 0 to 9.
        hidden: hidden units.
    """

    def objective(seed: int) -> SequenceClassification:
        with seeded_generator(HashKey(seed, Domain.PROBLEM, 0, _START), torch.device("cpu")):
            return SequenceClassification(MlpClassifier(images.shape[1], hidden=hidden, classes=10, dtype=_DTYPE))

    return Problem(images.to(_DTYPE), {"label": digits}, objective)


def _load_digits() -> tuple[Tensor, Tensor]:
    """(1797, 64) pixels from 0 to 1, and the digits that they show."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UsageError(
            "problem.type: digits are part of scikit-learn, which is not installed; pip install 'vamo-ft[paper]'"
        ) from None
    images, digits = load_digits(return_X_y=True)
    return torch.from_numpy(images) / 16, torch.from_numpy(digits).long()
