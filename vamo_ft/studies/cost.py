"""What an epoch with a method costs beside one of back-propagation alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from vamo_ft.assemble import Subject
from vamo_ft.core.types import Batch, Work
from vamo_ft.estimators.probes import probe_points, probe_work

__all__ = ["Cost", "EpochWork", "cost_of_epoch"]


@dataclass(frozen=True, slots=True)
class EpochWork:
    """What an epoch evaluates and costs.

    Attributes:
        forward_samples: forward passes of one sample.
        backward_samples: backward passes of one sample.
        flops: floating-point operations.
    """

    forward_samples: float
    backward_samples: float
    flops: float

    def __add__(self, other: "EpochWork") -> "EpochWork":
        return EpochWork(
            self.forward_samples + other.forward_samples,
            self.backward_samples + other.backward_samples,
            self.flops + other.flops,
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """An epoch with the method beside one of back-propagation alone.

    Attributes:
        plain: of back-propagation.
        method: with the method.
        kappa: the method's operations over those of back-propagation; counted, and in the usual case
            `1 + (q + 1) / (3 R)` with forward differences, R epochs between snapshots, and all parameters trained.
    """

    plain: EpochWork
    method: EpochWork
    kappa: float


def cost_of_epoch(subject: Subject, batches: Sequence[Batch], *, plain: Work, every_step: Work) -> Cost:
    """Scales what was counted on some batches to an epoch. Layers that `block` would reuse are counted in full.

    Args:
        batches: on which the work was counted, and whose probe points are counted here.
        plain: of back-propagation on them.
        every_step: what the method does with them besides in a step: probes at the snapshot, for `source: recompute`.
    """
    counted = sum(len(batch) for batch in batches)
    epoch = subject.source.samples_per_epoch / counted
    points = probe_points(subject.difference, num_probes=subject.num_probes, eps=1.0)
    probes = probe_work(batches, points)
    reference = _scaled(subject, plain, epoch)
    if subject.snapshots is None:
        method = _scaled(subject, probes, epoch)
    else:
        snapshots = subject.snapshots.samples / subject.snapshots.epochs / counted  # passes over the batches an epoch
        method = reference + _scaled(subject, every_step, epoch) + _scaled(subject, probes, snapshots)
    return Cost(reference, method, method.flops / reference.flops)


def _scaled(subject: Subject, work: Work, factor: float) -> EpochWork:
    return EpochWork(work.forward_samples * factor, work.backward_samples * factor, subject.flops(work) * factor)
