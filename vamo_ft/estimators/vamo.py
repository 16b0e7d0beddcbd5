"""VAMO: mini-batch gradients with a zeroth-order variance correction from a snapshot.

Shapes: b samples of a batch, q probes (`num_probes`), d trainable parameters.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, SampleSource, StateDict
from vamo_ft.core.types import Batch, Estimate, Work
from vamo_ft.estimators.adaptive_alpha import AdaptiveAlpha
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.snapshot import Snapshot, Snapshots

__all__ = ["AdaptiveRefresh", "BatchNoise", "Vamo"]

_log = logging.getLogger("vamo_ft")

_CORRECTION = 0xFFFFFFFE  # probe number of the bits that round a bfloat16 gradient, beside those of probe points


@dataclass(frozen=True, slots=True)
class AdaptiveRefresh:
    """A new snapshot only where the old one no longer tells much, and within a budget.

    Attributes:
        min_correlation: of the snapshot's noise with the steps' gradients, below which it is replaced.
        budget: forward passes that snapshots may take for each one of training.
    """

    min_correlation: float
    budget: float


@dataclass(frozen=True, slots=True)
class BatchNoise:
    """What the snapshot says of a batch's noise.

    Attributes:
        noise: (q,) float64 b, along the directions.
        weights: (q,) float64 `w = G^-1 b`, coefficients of the noise's projection on the directions' span.
        work: what it cost.
    """

    noise: Tensor
    weights: Tensor
    work: Work


class Vamo:
    """`v = grad f_I(x) - alpha sum_j w_j z_j` with `w = G^-1 b`, `G_jk = <z_j, z_k>`.

    `b` is what the snapshot xs says of batch I's noise along the q shared directions z_j (see `DerivativeTable`): the
    batch's zeroth-order derivatives less the full data's. The correction is the orthogonal projection of that noise on
    span(z), so it is free of the scale of z, and its mean over batches is zero: `E[v] = E[grad f_I]` for any alpha that
    does not depend on the batch. For q << d it is the paper's formula with coefficient `alpha q / d`. Without
    orthogonalisation `w_j = b_j / G_jj`, the sum over unit directions.

    The paper's radius mu along unit directions is `eps sqrt(d)` here.

    Source: Chen and Ma 2025, "VAMO", arXiv 2505.13954; the projection, the table, the adaptive coefficient and informed
    directions are this project's.

    Args:
        first_order: gives `grad f_I(x)`.
        snapshots: takes snapshots.
        alpha: the coefficient; None lets it adapt (`AdaptiveAlpha`).
        snapshot_due: whether a snapshot may be due before a step (asked after the first one only).
        refresh: conditions under which a due snapshot is taken; None takes every one.
    """

    def __init__(
        self,
        first_order: FirstOrder,
        snapshots: Snapshots,
        parameters: TrainableParameters,
        directions: Directions,
        *,
        alpha: float | None,
        snapshot_due: Callable[[int], bool],
        refresh: AdaptiveRefresh | None = None,
    ) -> None:
        self._first_order = first_order
        self._snapshots = snapshots
        self._parameters = parameters
        self._directions = directions
        self._alpha = alpha
        self._snapshot_due = snapshot_due
        self._refresh = refresh
        self._adaptive = None if alpha is not None and refresh is None else AdaptiveAlpha(device=parameters.device)
        self._informed = directions if isinstance(directions, GradientSubspace) else None
        self._snapshot: Snapshot | None = None
        self._spent = 0  # forward passes of one sample, in snapshots

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Takes a snapshot when one is due, or goes on with one that was interrupted.

        Informed directions have to see some gradients before the first snapshot; until then nothing is corrected.

        Raises:
            StopRequested: between two batches of the pass; the state holds what was scored so far.
        """
        if self._is_due(source, step):
            if self._informed is not None:
                self._informed.freeze(share=self._snapshots.share)
            self._snapshot = self._snapshots.begin(source, step)
        snapshot = self._snapshot
        if snapshot is None or snapshot.scoring.complete:
            return Work()
        self._snapshots.complete(source, snapshot)
        self._spent += snapshot.scoring.work.forward_samples
        if self._adaptive is not None:
            self._adaptive.refresh(snapshot.table.mean)
        return snapshot.scoring.work

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """The mini-batch gradient, then the correction from the table (or from forward passes at the snapshot)."""
        first_order = self._first_order.estimate(micro_batches, step)
        gradients, snapshot = self._parameters.gradients(), self._snapshot
        # All passes come before what changes the state: a stop within them has to leave it as it was.
        batch_noise = None if snapshot is None else self.batch_noise(micro_batches)
        if self._informed is not None:
            self._informed.observe(gradients)
        if snapshot is None or batch_noise is None:
            return first_order
        age, keys = step - snapshot.step, self._snapshots.keys(snapshot)
        metrics: dict[str, Tensor | float] = {}
        alpha: Tensor | float = 0.0 if self._alpha is None else self._alpha
        if self._adaptive is not None:
            if self._alpha is None:
                alpha = self._adaptive.alpha(age)
            assert snapshot.gram is not None and snapshot.inverse_gram is not None
            self._adaptive.observe(
                self._directions.dots(gradients, keys),
                batch_noise.weights,
                gram=snapshot.gram,
                inverse_gram=snapshot.inverse_gram,
                alpha=alpha,
                squared_norm=self._parameters.total(_squared_norm(gradients)),
                age=age,
            )
            metrics["correlation"] = self._adaptive.correlation(age)
            metrics["removed_share"] = self._adaptive.removed_share()
        coefficients = alpha * batch_noise.weights  # (q,)
        if self._alpha != 0:
            rounding = HashKey(keys[0].seed, Domain.ROUNDING, step, _CORRECTION)
            self._directions.axpy_(gradients, -coefficients, keys, rounding=rounding)
        assert self._snapshots.eps is not None
        metrics |= {
            "alpha": alpha,
            "paper_alpha": alpha * (len(keys) / self._directions.numel),
            "correction_coefficient": coefficients.abs().mean(),
            "snapshot_age": float(age),
            "eps": self._snapshots.eps,
        }
        if self._snapshots.eps_correlation is not None:
            metrics["eps_correlation"] = self._snapshots.eps_correlation
        return Estimate(loss=first_order.loss, work=first_order.work + batch_noise.work, metrics=metrics)

    @property
    def keys(self) -> tuple[HashKey, ...]:
        """The directions of the present snapshot."""
        assert self._snapshot is not None, "prepare comes first"
        return self._snapshots.keys(self._snapshot)

    @property
    def eps(self) -> float | None:
        """The size of the perturbation; None while it has yet to be searched for."""
        return self._snapshots.eps

    def batch_noise(self, micro_batches: Sequence[Batch]) -> BatchNoise:
        """What the present snapshot says of the noise of these samples together."""
        snapshot = self._snapshot
        assert snapshot is not None and snapshot.scoring.complete, "prepare comes first"
        noise, work = self._snapshots.noise(snapshot, micro_batches)
        return BatchNoise(noise, self._snapshots.weights(snapshot, noise), work)

    def state_dict(self) -> StateDict:
        """The snapshot, what was learnt of the coefficient, informed directions, and forward passes spent."""
        return {
            **self._snapshots.state_dict(self._snapshot),
            "spent": self._spent,
            "adaptive": None if self._adaptive is None else self._adaptive.state_dict(),
            "informed": None if self._informed is None else self._informed.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        if self._informed is not None:
            self._informed.load_state_dict(state["informed"])  # first: the Gram matrix is theirs
        self._snapshot = self._snapshots.restored(state)
        self._spent = state["spent"]
        if self._adaptive is not None:
            self._adaptive.load_state_dict(state["adaptive"])

    def _is_due(self, source: SampleSource, step: int) -> bool:
        snapshot = self._snapshot
        if snapshot is None:
            return self._informed is None or self._informed.ready
        if snapshot.step == step or not snapshot.scoring.complete or not self._snapshot_due(step):
            return False
        refresh = self._refresh
        if refresh is None:
            return True
        assert self._adaptive is not None
        correlation = self._adaptive.recent_correlation()
        if correlation is None or correlation >= refresh.min_correlation:
            return False
        allowed = refresh.budget * step * source.batch_size
        if self._spent + self._snapshots.forward_samples(source) > allowed:
            return False
        _log.info("a new snapshot before step %d: the correlation fell to %.2f", step + 1, correlation)
        return True


def _squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """() squared Euclidean norm of all gradients together."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return torch.stack(norms).square().sum()
