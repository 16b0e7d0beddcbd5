"""Zeroth-order estimate from loss differences (SPSA; MeZO)."""

from collections.abc import Sequence

from vamo_ft.core.hashing import direction_keys
from vamo_ft.core.protocols import Runtime
from vamo_ft.core.types import Batch, Estimate, ProjectedGradient, total_count
from vamo_ft.estimators.probes import Difference, LossProbe, not_reached, probe_points
from vamo_ft.estimators.stateless import Stateless

__all__ = ["Spsa"]


class Spsa(Stateless):
    """`g = (1/q) sum_j c_j z_j`, with c_j the directional derivative of the step's mean loss along z_j.

    The same directions serve every micro-batch of the step. The estimate stays a list of coefficients; no gradient is
    allocated. The reported loss is the mean over the probe points.

    Args:
        probe: evaluates the losses.
        num_probes: q.
        eps: perturbation per coordinate.
        difference: central (2q forward passes) or forward (q + 1).
        seed: the run's seed; directions are keyed by (seed, step, probe).
        piecewise_constant: the objective moves in jumps, as a metric does: losses that are the same at all probe points
            then say that nothing was learnt in this step, and all coefficients are 0.

    Source: Spall 1992; Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333,
    Algorithm 1.
    """

    def __init__(
        self,
        probe: LossProbe,
        runtime: Runtime,
        *,
        num_probes: int,
        eps: float,
        difference: Difference,
        seed: int,
        piecewise_constant: bool = False,
    ) -> None:
        self._probe = probe
        self._runtime = runtime
        self._num_probes = num_probes
        self._points = probe_points(difference, num_probes=num_probes, eps=eps)
        self._seed = seed
        self._piecewise_constant = piecewise_constant

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """2q or q + 1 forward passes per sample.

        Raises:
            VamoFtError: the losses do not depend on a perturbation of everything, and are not piecewise constant. (That
                of one block may be lost in rounding: a step of zero.)
        """
        keys = direction_keys(self._seed, step, self._num_probes)
        derivatives, total = self._probe.derivatives(micro_batches, self._points, keys)
        if not self._piecewise_constant and not derivatives.any() and self._probe.reaches_all(keys):
            raise not_reached(f"step {step + 1}", "the loss of every sample is the same to the last bit")
        weight = total_count(micro_batches, self._runtime.device)
        coefficients = derivatives.sum(0) / weight  # (q,)
        return Estimate(
            loss=total / weight,
            work=self._probe.work(micro_batches, self._points, keys),
            projected=ProjectedGradient(coefficients / self._num_probes, keys),
            metrics={"projected_gradient": coefficients.abs().mean()},
        )
