"""Measures a configured method on its own model and data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vamo_ft.assemble import Subject
from vamo_ft.core.blocks import BlockDirections
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey, direction_keys
from vamo_ft.core.second_moment import SecondMoment
from vamo_ft.estimators.probes import Difference, LossProbe
from vamo_ft.studies.captured import DirectionSet, measure_gradient_noise
from vamo_ft.studies.correction import Followed, follow_correction
from vamo_ft.studies.cost import Cost, cost_of_epoch
from vamo_ft.studies.held_out import SampleSubset
from vamo_ft.studies.noise_floor import EPS_GRID, RADIUS_GRID, ErrorCurve, measure_errors
from vamo_ft.studies.variance import VarianceSummary, measured_ages, summarise_variance
from vamo_ft.studies.verdict import Verdict, judge_correction, judge_size
from vamo_ft.studies.warm_up import informed_directions, train

__all__ = ["Diagnosis", "Reach", "diagnose"]

_FLOOR_SAMPLES, _FLOOR_DIRECTIONS = 16, 2


@dataclass(frozen=True, slots=True)
class Reach:
    """Stable rank and effective overlap of a structure (see `SecondMoment`)."""

    stable_rank: float
    overlap: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was measured.

    Attributes:
        step: training steps before the point of the measurements.
        num_trainable: d.
        num_probes: q.
        num_samples: per-sample gradients.
        num_batches: batches whose variance was measured; 0 where there is no correction.
        seen: samples of these that training has taken too, because the data has too few.
        size: eps, or the radius, that the method uses.
        size_key: where it is written.
        errors: of finite differences: the configured kind first, then the central one where that is another.
        shares: share of the per-sample gradient noise in the span of `configured`, `isotropic` and `informed`
            directions, q each.
        uninformed: why there are no informed ones; None where there are.
        signal_to_noise: |grad f|^2 over the mean squared noise of a sample's gradient.
        reach: of the structure at the mean gradient, and where it goes by blocks of every one of them, by name.
        variance: with the correction, by age of the snapshot; None where the method has no correction.
        period: steps between two snapshots.
        cost: of an epoch.
        verdict: on the correction; None where there is none.
        size_verdict: on eps or the radius.
    """

    step: int
    num_trainable: int
    num_probes: int
    num_samples: int
    num_batches: int
    seen: int
    size: float
    size_key: str
    errors: tuple[ErrorCurve, ...]
    shares: Mapping[str, float]
    uninformed: str | None
    signal_to_noise: float
    reach: Mapping[str, Reach]
    variance: VarianceSummary | None
    period: int | None
    cost: Cost
    verdict: Verdict | None
    size_verdict: str


def diagnose(subject: Subject, *, samples: int, steps: int, batches: int) -> Diagnosis:
    """Trains for some steps in memory, then measures on samples that come later in the run's order.

    Args:
        samples: per-sample gradients to take, two or more.
        steps: of training before the measurements; their gradients also feed the informed directions.
        batches: whose variance is measured, eight or more for intervals that mean something.

    Raises:
        UsageError: the configured directions need more steps.
        DivergenceError: the loss is not finite.
    """
    informed = informed_directions(subject, steps)
    train(subject, range(steps), informed=informed.directions, estimator=subject.training)

    plan = subject.snapshots
    ages = (0,) if plan is None else measured_ages(plan.steps)
    first = steps + max(ages)
    drawn = [subject.source.step_indices(first + number) for number in range(batches)]
    held_out = SampleSubset(subject.source, _distinct(drawn))
    if subject.vamo is not None:
        subject.vamo.prepare(held_out, steps)
        size, keys = subject.vamo.eps, subject.vamo.keys
    else:
        size, keys = subject.eps, direction_keys(subject.seed, steps, subject.num_probes)
    assert size is not None

    pool = _pool(subject, drawn, samples=samples, step=first + batches)
    others = tuple(HashKey(subject.seed, Domain.DIAGNOSIS, 1, probe) for probe in range(subject.num_probes))
    sets = {
        "configured": DirectionSet(subject.directions, keys),
        "isotropic": DirectionSet(HashedDirections(subject.parameters), others),
    }
    if informed.directions is not None:
        if informed.directions is not subject.directions:
            informed.directions.freeze()
        sets["informed"] = DirectionSet(informed.directions, keys)
    noise = measure_gradient_noise(
        subject.objective,
        subject.parameters,
        subject.runtime,
        [subject.source.batch([index]) for index in pool],
        sets,
        progress=subject.progress,
    )
    errors = _measure_errors(subject, pool, keys, noise.derivatives["configured"])
    reach = _reach(subject, noise.mean_gradient, keys)

    if subject.vamo is not None:
        followed = follow_correction(subject, subject.vamo, held_out, drawn, start=steps, ages=ages)
    else:
        drawn = drawn[:1]  # for the cost alone
        followed = _without_correction(subject, drawn[0], step=first)
    cost = cost_of_epoch(
        subject,
        [batch for indices in drawn for batch in subject.micro_batches(indices)],
        plain=followed.plain,
        every_step=followed.noise,
    )
    variance, verdict = None, None
    if plan is not None:
        variance = summarise_variance(followed.variances, alpha=subject.alpha, period=plan.steps, seed=subject.seed)
        verdict = judge_correction(
            variance.configured,
            None if subject.alpha is None else variance.best,
            kappa=cost.kappa,
            plain_method=subject.plain_method,
        )
    trained = {index for step in range(first) for index in subject.source.step_indices(step)}
    key = "method.radius" if subject.sized_by_radius else "method.eps"
    return Diagnosis(
        step=steps,
        num_trainable=subject.parameters.numel,
        num_probes=subject.num_probes,
        num_samples=len(pool),
        num_batches=0 if plan is None else batches,
        seen=len(trained & {*pool, *_distinct(drawn)}),
        size=size,
        size_key=key,
        errors=errors,
        shares=noise.shares,
        uninformed=informed.reason,
        signal_to_noise=noise.signal_to_noise,
        reach=reach,
        variance=variance,
        period=None if plan is None else plan.steps,
        cost=cost,
        verdict=verdict,
        size_verdict=judge_size(key, size, recommended=errors[0].recommended, usable=errors[0].usable),
    )


def _distinct(drawn: Sequence[Sequence[int]]) -> list[int]:
    return list(dict.fromkeys(index for indices in drawn for index in indices))


def _pool(subject: Subject, drawn: Sequence[Sequence[int]], *, samples: int, step: int) -> list[int]:
    """The first `samples` different samples of the batches, and where they do not suffice of the steps from `step`."""
    pool = dict.fromkeys(_distinct(drawn))
    wanted = min(samples, subject.source.num_samples)
    while len(pool) < wanted:
        pool |= dict.fromkeys(subject.source.step_indices(step))
        step += 1
    return list(pool)[:wanted]


def _measure_errors(
    subject: Subject, pool: Sequence[int], keys: Sequence[HashKey], exact: Tensor
) -> tuple[ErrorCurve, ...]:
    chosen, few = pool[:_FLOOR_SAMPLES], keys[:_FLOOR_DIRECTIONS]
    probe = LossProbe(subject.objective, subject.parameters, subject.directions, subject.runtime)
    kinds: tuple[Difference, ...] = ("central",) if subject.difference == "central" else ("forward", "central")
    return tuple(
        measure_errors(
            probe,
            subject.micro_batches(chosen),
            few,
            exact[: len(chosen), : len(few)],
            difference=difference,
            sizes=RADIUS_GRID if subject.sized_by_radius else EPS_GRID,
        )
        for difference in kinds
    )


def _reach(subject: Subject, gradient: Sequence[Tensor], keys: Sequence[HashKey]) -> dict[str, Reach]:
    moments: dict[str, SecondMoment] = {"structure": subject.directions.second_moment(gradient, keys)}
    if isinstance(subject.directions, BlockDirections):
        moments |= subject.directions.second_moments(gradient)
    return {name: Reach(moment.stable_rank, moment.overlap) for name, moment in moments.items()}


def _without_correction(subject: Subject, indices: Sequence[int], *, step: int) -> Followed:
    """The work of back-propagation on one batch."""
    work = subject.first_order.estimate(subject.micro_batches(indices), step).work
    subject.parameters.clear_gradients()
    return Followed({}, work, type(work)())
