"""Follows a snapshot's correction along the training steps after it.

Shapes: M batches, q probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vamo_ft.assemble import Subject
from vamo_ft.core.types import Work
from vamo_ft.estimators.vamo import Vamo
from vamo_ft.studies.contrasts import Contrasts, CorrectedVariance
from vamo_ft.studies.held_out import SampleSubset
from vamo_ft.studies.warm_up import train

__all__ = ["Followed", "follow_correction"]


@dataclass(frozen=True, slots=True)
class Followed:
    """Variances by age of the snapshot, and the work that one round over the batches took.

    Attributes:
        variances: by age, ascending.
        plain: the mini-batch gradients' work.
        noise: the work of asking the snapshot.
    """

    variances: dict[int, CorrectedVariance]
    plain: Work
    noise: Work


def follow_correction(
    subject: Subject,
    vamo: Vamo,
    held_out: SampleSubset,
    batches: Sequence[Sequence[int]],
    *,
    start: int,
    ages: Sequence[int],
) -> Followed:
    """Measures the batch gradient's variance, corrected and not, at the snapshot's point and after some steps.

    Between two measurements the run's optimizer takes plain first-order steps. Gradients are those of training, with
    its dropout; what the snapshot says of a batch does not depend on the age, and is asked once.

    Args:
        vamo: has its snapshot, over the samples of `held_out`.
        batches: M, the samples of each.
        start: steps made so far.
        ages: ascending, from 0.
    """
    weights: list[Tensor] = []  # (q,) each
    noise_work = Work()
    for indices in batches:
        noise = vamo.batch_noise([held_out.batch(held_out.numbers(indices))])
        weights.append(noise.weights)
        noise_work += noise.work
    gram = subject.directions.gram(vamo.keys)
    variances, work, step = {}, Work(), start
    for age in ages:
        train(subject, range(step, start + age), informed=None, estimator=subject.first_order)
        step, work, contrasts = start + age, Work(), Contrasts(gram)
        with subject.progress.task(f"variance at age {age}", len(batches)) as task:
            for number, (indices, weight) in enumerate(zip(batches, weights, strict=True)):
                micro_batches = subject.micro_batches(indices)
                work += subject.first_order.estimate(micro_batches, start + max(ages) + number).work
                gradients = subject.parameters.gradients()
                contrasts.add(gradients, subject.directions.dots(gradients, vamo.keys), weight)
                task.advance()
        subject.parameters.clear_gradients()
        variances[age] = contrasts.result()
    return Followed(variances, work, noise_work)
