"""The coefficient of the correction, learnt from the steps that went before.

Shapes: q probes.
"""

import torch
from torch import Tensor

from vamo_ft.core.protocols import StateDict

__all__ = ["AdaptiveAlpha"]

_DECAY = 0.98  # of the averages that the coefficient is read from
_RECENT_DECAY = 0.9  # of those that tell how the present snapshot does
_MEAN_DECAY = 0.8  # of the running mean m of the derivatives
_FEWEST = 16  # updates before an average is trusted
_BUCKETS = 32  # ages up to 2**32 steps
_ALL_AGES, _RECENT = _BUCKETS, _BUCKETS + 1  # rows of the averages


class AdaptiveAlpha:
    """`alpha = clip(S_ab / S_bb, 0, 1)`, the variance-optimal coefficient as a regression slope.

    A step's gradient has the derivatives `a_j = <grad f_I(x), z_j>` along the directions, and the snapshot says that
    `b_j` of them is noise, which makes the correction `sum_j w_j z_j` (`w = G^-1 b` where it is a projection). The
    variance of `grad f_I - alpha sum_j w_j z_j` is least at `alpha = E[(a - E a)^T w] / E[w^T G w]`. `S_ab` and `S_bb`
    are running averages of `(a - m)^T w` and `w^T G w` (`b^T w` for a projection), decay 0.98, pooled over the
    directions, with `m` a running mean of `a` (decay 0.8) that begins at the full data's derivatives at each snapshot.

    The slope falls as the snapshot ages, so there is one pair of averages for each `floor(log2(age + 1))`, kept across
    snapshots. A bucket with fewer than 16 updates, as that of the first steps is for many snapshots, takes the nearest
    older one's slope, which errs on the safe side; where there is none, that over all ages; and with fewer than 16
    updates in all alpha is 0. Only earlier steps enter, so that the corrected gradient stays unbiased:
    `E[v] = E[grad f_I]`.

    Nothing here waits for the device, except `recent_correlation`.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._averages = torch.zeros(_BUCKETS + 2, 3, dtype=torch.float64, device=device)  # of ab, bb, aa
        self._effect = torch.zeros(2, dtype=torch.float64, device=device)  # of variance removed, |grad f_I|^2
        self._updates = [0] * (_BUCKETS + 2)
        self._mean: Tensor | None = None  # (q,) m

    def refresh(self, mean: Tensor) -> None:
        """A new snapshot, with `mean` (q,) the derivatives of the full data's mean loss along its directions."""
        self._mean = mean.clone()
        self._averages[_RECENT].zero_()
        self._updates[_RECENT] = 0

    def alpha(self, age: int) -> Tensor:
        """() float64, the coefficient for a step `age` steps after the snapshot."""
        slope = self._averages[self._row(age), 0] / self._averages[self._row(age), 1]
        trusted = self._updates[_ALL_AGES] >= _FEWEST
        return torch.nan_to_num(slope, nan=0.0).clamp(0.0, 1.0) if trusted else torch.zeros_like(slope)

    def observe(
        self,
        derivatives: Tensor,
        weights: Tensor,
        *,
        gram: Tensor,
        inverse_gram: Tensor,
        alpha: Tensor | float,
        squared_norm: Tensor,
        age: int,
    ) -> None:
        """Learns from a step, after its `alpha` was asked for.

        Args:
            derivatives: (q,) a.
            weights: (q,) w, of the correction at coefficient 1.
            gram: (q, q) G.
            inverse_gram: (q, q) G^-1, for the correlation.
            alpha: () the coefficient that the step took.
            squared_norm: () |grad f_I|^2.
            age: steps since the snapshot.
        """
        assert self._mean is not None, "a snapshot comes first"
        deviation = derivatives - self._mean
        products = torch.stack([deviation @ weights, weights @ gram @ weights, deviation @ (inverse_gram @ deviation)])
        for row, decay in ((_bucket(age), _DECAY), (_ALL_AGES, _DECAY), (_RECENT, _RECENT_DECAY)):
            self._averages[row].lerp_(products, 1 - decay)
            self._updates[row] += 1
        removed = 2 * alpha * products[0] - alpha * alpha * products[1]
        self._effect.lerp_(torch.stack([removed, squared_norm.double()]), 1 - _DECAY)
        self._mean.lerp_(derivatives, 1 - _MEAN_DECAY)

    def correlation(self, age: int) -> Tensor:
        """() float64, `S_ab / sqrt(S_aa S_bb)` of steps of this age; 0 before the first."""
        return _correlation(self._averages[self._row(age)])

    def recent_correlation(self) -> float | None:
        """The correlation over the last ten steps or so of the present snapshot; None while there are too few."""
        return float(_correlation(self._averages[_RECENT])) if self._updates[_RECENT] >= _FEWEST else None

    def removed_share(self) -> Tensor:
        """() float64, variance removed as a share of E|grad f_I|^2, over about the last 50 steps.

        The share of the variance itself cannot be known while training: `vamo-ft diagnose` measures it.
        """
        return torch.nan_to_num(self._effect[0] / self._effect[1], nan=0.0)

    def state_dict(self) -> StateDict:
        """All averages."""
        return {
            "averages": self._averages,
            "effect": self._effect,
            "updates": list(self._updates),
            "mean": self._mean,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""
        device, mean = self._averages.device, state["mean"]
        self._averages = state["averages"].to(device)
        self._effect = state["effect"].to(device)
        self._updates = list(state["updates"])
        self._mean = None if mean is None else mean.to(device)

    def _row(self, age: int) -> int:
        older = range(_bucket(age), _BUCKETS)
        return next((bucket for bucket in older if self._updates[bucket] >= _FEWEST), _ALL_AGES)


def _bucket(age: int) -> int:
    return min((age + 1).bit_length() - 1, _BUCKETS - 1)


def _correlation(averages: Tensor) -> Tensor:
    ab, bb, aa = averages
    return torch.nan_to_num(ab / (aa * bb).sqrt(), nan=0.0)
