"""How much of the noise of per-sample gradients lies in the span of a few directions.

Shapes: n samples, q directions, d trainable parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, Objective, Progress, Runtime
from vamo_ft.core.second_moment import squared_norm
from vamo_ft.core.types import Batch
from vamo_ft.estimators.snapshot import pseudo_inverse

__all__ = ["DirectionSet", "GradientNoise", "measure_gradient_noise"]


@dataclass(frozen=True, slots=True)
class DirectionSet:
    """The q directions of some keys."""

    directions: Directions
    keys: tuple[HashKey, ...]


@dataclass(frozen=True, slots=True)
class GradientNoise:
    """What a pass over per-sample gradients tells.

    Attributes:
        derivatives: by name of a set, (n, q) float64 `<grad L_i, z_j>`.
        shares: by name of a set, the share of the noise that lies in its span.
        mean_gradient: of the mean loss, one tensor for each parameter.
        signal_to_noise: |grad f|^2 over the mean squared norm of a sample's noise, both per weight, without the noise
            that the mean over n samples still holds; it can come out slightly negative.
    """

    derivatives: Mapping[str, Tensor]
    shares: Mapping[str, float]
    mean_gradient: tuple[Tensor, ...]
    signal_to_noise: float


def measure_gradient_noise(
    objective: Objective,
    parameters: TrainableParameters,
    runtime: Runtime,
    samples: Sequence[Batch],
    sets: Mapping[str, DirectionSet],
    *,
    progress: Progress,
) -> GradientNoise:
    """One backward pass for each sample, with dropout off.

    The noise of sample i, with summed loss L_i and weight t_i, is `n_i = grad L_i - t_i grad f`: the noise of a batch's
    mean gradient is their sum over `b Tbar`. A set of directions Z captures

        sum_i |P n_i|^2 / sum_i |n_i|^2,      |P n|^2 = (Z^T n)^T (Z^T Z)^+ (Z^T n),

    P being the orthogonal projector on their span; q of d isotropic ones capture q/d. No gradient outlives its sample:
    with `grad f = sum_i grad L_i / sum_i t_i` and `h = sum_i t_i grad L_i`,

        sum_i |n_i|^2 = sum_i |grad L_i|^2 - 2 <h, grad f> + sum_i t_i^2 |grad f|^2.

    Args:
        samples: batches of one sample each.
        sets: by name.
    """
    total = [torch.zeros_like(tensor, dtype=_wide(tensor)) for tensor in parameters.tensors]
    weighted = [torch.zeros_like(tensor) for tensor in total]
    squares = torch.zeros((), dtype=torch.float64, device=runtime.device)
    rows: dict[str, list[Tensor]] = {name: [] for name in sets}
    objective.module.eval()
    weights = torch.stack([sample.counts.double().sum() for sample in samples]).to(runtime.device)  # (n,)
    with progress.task("per-sample gradients", len(samples)) as task:
        for sample, weight in zip(samples, weights.unbind(), strict=True):
            parameters.clear_gradients()
            with runtime.autocast():
                loss = objective.terms(sample.to(runtime.device)).total.sum()
            runtime.backward(loss)
            gradients = parameters.gradients()
            for place, gradient in enumerate(gradients):
                total[place] += gradient
                weighted[place] += gradient * weight.to(total[place].dtype)
            squares += squared_norm(gradients)
            for name, each in sets.items():
                rows[name].append(each.directions.dots(gradients, each.keys))
            task.advance()
    parameters.clear_gradients()
    mean = tuple(tensor / weights.sum().to(tensor.dtype) for tensor in total)
    signal = squared_norm(mean)
    inner = torch.stack([(h * m).sum(dtype=torch.float64) for h, m in zip(weighted, mean, strict=True)]).sum()
    noise = squares - 2 * inner + weights.square().sum() * signal
    unbiased = noise * (len(samples) / max(1, len(samples) - 1))  # deviations are from a mean that they have moved
    derivatives = {name: torch.stack(each) for name, each in rows.items()}
    shares = {}
    for name, each in sets.items():
        inverse = pseudo_inverse(each.directions.gram(each.keys))
        centred = derivatives[name] - weights.unsqueeze(1) * each.directions.dots(mean, each.keys)  # (n, q)
        shares[name] = float(((centred @ inverse) * centred).sum() / noise)
    return GradientNoise(
        derivatives=derivatives,
        shares=shares,
        mean_gradient=mean,
        signal_to_noise=float((signal - unbiased / weights.sum().square()) * weights.square().sum() / unbiased),
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
