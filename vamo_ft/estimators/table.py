"""The directional-derivative table of a snapshot.

Shapes: n samples of the data, b of a batch, q probes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vamo_ft.core.protocols import StateDict
from vamo_ft.core.transfer import to_device
from vamo_ft.estimators.probes import ProbePoint

__all__ = ["DerivativeTable"]


class DerivativeTable:
    """What a snapshot knows of every sample: q derivatives of its summed loss, and its weight.

    The rows replace a copy of the snapshot's parameters, forward passes there in every step, and a dense full gradient:
    with `dL_ij` the derivative of sample i's summed loss along z_j and t_i its weight,

        cbar_j = sum_i p_i dL_ij / sum_i p_i t_i        (i over the reference samples)
        b_j    = sum_{i in I} (dL_ij - t_i cbar_j) / (b Tbar),      Tbar = sum_i p_i t_i / sum_i p_i

    where p_i is how often steps draw sample i. `b` is the noise of batch I's mean gradient along the directions, and
    has mean zero over batches drawn by that law.
    `normaliser="batch"` divides by the batch's own weight instead of `b Tbar`, as SVRG does.

    Args:
        num_samples: n; rows that were not scored count as absent.
        num_probes: q.
        dtype: of the rows, float32 except for float64 parameters. State is 4nq bytes, and 4n for the weights.
    """

    def __init__(self, num_samples: int, *, num_probes: int, dtype: torch.dtype, device: torch.device) -> None:
        self._derivatives = torch.zeros(num_samples, num_probes, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_samples, dtype=torch.float32, device=device)
        self._scored = torch.zeros(num_samples, dtype=torch.bool)  # on the host: checked without a synchronisation
        self._mean = torch.zeros(num_probes, dtype=torch.float64, device=device)
        self._mean_count = torch.ones((), dtype=torch.float64, device=device)
        self._dtype = dtype

    @property
    def mean(self) -> Tensor:
        """(q,) float64, `cbar`: derivatives of the mean loss over the reference samples."""
        return self._mean

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What `add` adds to."""
        return (self._derivatives,)

    @property
    def marks(self) -> tuple[Tensor, ...]:
        """What `add` writes once for every sample."""
        return self._counts, self._scored

    def not_finite(self) -> tuple[int, ...]:
        """Samples one of whose derivatives is NaN or infinite."""
        rows = ~torch.isfinite(self._derivatives).all(1)
        return tuple(rows.nonzero().flatten().tolist())

    def add(self, indices: Sequence[int], point: ProbePoint, losses: Tensor, counts: Tensor) -> None:
        """Enters the (m,) losses of samples `indices` at a probe point."""
        rows = to_device(torch.tensor(indices), self._derivatives.device)
        self._derivatives[rows, point.columns] += point.weight * losses.unsqueeze(1)
        self._counts[rows] = counts.to(self._counts)
        self._scored[list(indices)] = True

    def close(self, reference: Sequence[int], *, frequencies: Tensor | None = None) -> None:
        """Ends the pass: takes the means over `reference`, and keeps the rows in their final precision.

        Args:
            reference: samples as they are drawn: one that steps draw k times as often as others may stand here k times.
            frequencies: (m,) how often steps draw each of them, where data sets are mixed by weights; None: as often as
                it stands there. Under that law the noise has mean zero.
        """
        rows = torch.tensor(reference, device=self._derivatives.device)
        drawn = (torch.ones(len(reference)) if frequencies is None else frequencies).to(self._mean)  # (m,) float64
        counts = self._counts[rows].double() * drawn
        self._derivatives = self._derivatives.to(self._dtype)
        self._mean = (self._derivatives[rows].double() * drawn.unsqueeze(1)).sum(0) / counts.sum()
        self._mean_count = counts.sum() / drawn.sum()

    def batch_noise(self, indices: Sequence[int], *, normaliser: str) -> Tensor:
        """(q,) float64, `b` for the batch of samples `indices`."""
        assert bool(self._scored[list(indices)].all()), "a sample of the step is not in the snapshot's table"
        rows = to_device(torch.tensor(indices), self._derivatives.device)
        return self.noise(self._derivatives[rows], self._counts[rows], normaliser=normaliser)

    def noise(self, derivatives: Tensor, counts: Tensor, *, normaliser: str) -> Tensor:
        """(q,) float64, `b` from (b, q) derivatives and (b,) weights evaluated elsewhere."""
        counts = counts.double()
        centred = derivatives.double() - counts.unsqueeze(1) * self._mean  # (b, q)
        return centred.sum(0) / (counts.sum() if normaliser == "batch" else len(counts) * self._mean_count)

    def state_dict(self) -> StateDict:
        """Rows, weights and means."""
        return {
            "derivatives": self._derivatives,
            "counts": self._counts,
            "scored": self._scored,
            "mean": self._mean,
            "mean_count": self._mean_count,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        device = self._derivatives.device
        self._derivatives = state["derivatives"].to(device, copy=True)  # a pass that goes on writes to them in place
        self._counts = state["counts"].to(device, copy=True)
        self._scored = state["scored"].to("cpu", copy=True)
        self._mean = state["mean"].to(device)
        self._mean_count = state["mean_count"].to(device)
