"""What the steps of a configured run cost, measured on a few of them that move nothing."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean, median

from vamo_ft.assemble.method import build_estimator, build_update_rule
from vamo_ft.assemble.micro_batch import micro_batch_size
from vamo_ft.assemble.parts import Parts, build_parts
from vamo_ft.assemble.surroundings import Surroundings, due, run_length
from vamo_ft.config.method import SvrgConfig, VamoConfig, VamoLiteralConfig, ZoSvrgConfig
from vamo_ft.config.period import Period
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.blocks import BlockDirections
from vamo_ft.core.memory import memory_explained
from vamo_ft.core.micro_batches import micro_batches_of
from vamo_ft.core.protocols import GradientEstimator, UpdateRule
from vamo_ft.core.types import Work
from vamo_ft.training.ledger import Ledger

__all__ = ["Pilot", "StepCost", "pilot_of", "run_pilot"]

_STEPS = 3
_TIMED_STEPS = 8
_WARM = 2  # steps whose time says nothing yet


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one step costs: its snapshot, where it takes one, and its estimate and update."""

    snapshot: Work
    update: Work
    snapshot_seconds: float
    update_seconds: float


@dataclass(frozen=True, slots=True)
class _Passes:
    """How often steps of one kind go over their batch: forward, backward, and the share of layers that is reused."""

    forward: float
    backward: float
    reused: float

    @classmethod
    def of(cls, costs: Sequence[StepCost], batch_size: int) -> "_Passes":
        samples = batch_size * len(costs)
        works = [cost.update for cost in costs]
        return cls(
            sum(work.forward_samples for work in works) / samples,
            sum(work.backward_samples for work in works) / samples,
            fmean(work.reused_layer_tokens / max(1, work.forward_tokens) for work in works),
        )

    def over(self, batch: Work) -> Work:
        """The work of a step on a batch, given as one forward pass over it."""
        tokens = round(self.forward * batch.forward_tokens)
        return Work(
            forward_samples=round(self.forward * batch.forward_samples),
            backward_samples=round(self.backward * batch.forward_samples),
            forward_tokens=tokens,
            backward_tokens=round(self.backward * batch.forward_tokens),
            forward_supervised=round(self.forward * batch.forward_supervised),
            backward_supervised=round(self.backward * batch.forward_supervised),
            reused_layer_tokens=round(self.reused * tokens),
        )


@dataclass(slots=True)
class Pilot:
    """The first steps of a run as they were measured, and every later one from them.

    A later step goes over its own batch, whose tokens are known, as often as those of its kind did in the pilot:
    steps with a snapshot and steps without. Snapshots come with their period and cost what the second one did (the
    first may search for eps); one that is taken by need only is taken as often as it may. Exact for methods of fixed
    passes, up to which samples a snapshot over a subset holds.

    Attributes:
        ledger: what work costs.
        length: steps of the configured run.
        first: the costs of steps 0, 1, 2 and so on.
        second: the costs of a step with a later snapshot, and of those that follow it; none where there are none.
    """

    ledger: Ledger
    length: int
    first: list[StepCost]
    second: list[StepCost]
    _batch: Callable[[int], Work]
    _batch_size: int
    _due: Callable[[int], bool]
    _plain: _Passes = field(init=False)
    _with_snapshot: _Passes = field(init=False)

    def __post_init__(self) -> None:
        began = next((number for number, cost in enumerate(self.first) if cost.snapshot.forward_samples), 0)
        steps = [*self.first[began:], *self.second]
        plain = [cost for cost in steps if not cost.snapshot.forward_samples] or steps
        snapshots = [cost for cost in steps if cost.snapshot.forward_samples]
        self._plain = _Passes.of(plain, self._batch_size)
        self._with_snapshot = _Passes.of(snapshots[-1:], self._batch_size) if snapshots else self._plain

    def cost(self, step: int) -> StepCost:
        """What step `step`, counted from 0, costs."""
        if step < len(self.first):
            known = self.first[step]
            return StepCost(known.snapshot, known.update, known.snapshot_seconds, self._seconds)
        batch = self._batch(step)
        later = next((cost for cost in reversed([*self.first, *self.second]) if cost.snapshot.forward_samples), None)
        if later is not None and self._due(step):
            work = self._with_snapshot.over(batch)
            return StepCost(later.snapshot, work, later.snapshot_seconds, self._seconds)
        return StepCost(Work(), self._plain.over(batch), 0.0, self._seconds)

    @property
    def _seconds(self) -> float:
        measured = [cost.update_seconds for cost in (*self.first, *self.second)]
        return median(measured[_WARM:] or measured)


def run_pilot(
    config: RunConfig,
    surroundings: Surroundings,
    *,
    timed: bool,
    by_layer: bool,
    enough: Callable[[StepCost, Ledger], bool],
) -> Pilot:
    """Makes some steps with learning rate 0, in memory: three, and through the first two snapshots.

    Args:
        timed: some more, for a time to rely on.
        by_layer: a whole cycle over the blocks of weights, where steps take one each, which cost differently.
        enough: asked with every step's cost; the rest need not be known.

    Raises:
        VamoFtError: model, data or method are not what they should be.
    """
    parts = build_parts(
        config, weights=None, use_cache=surroundings.use_cache, stop_requested=surroundings.stop_requested
    )
    least = _TIMED_STEPS if timed else _STEPS
    return pilot_of(config, parts, surroundings, least=least, by_layer=by_layer, enough=enough)


def pilot_of(
    config: RunConfig,
    parts: Parts,
    surroundings: Surroundings,
    *,
    least: int,
    by_layer: bool,
    enough: Callable[[StepCost, Ledger], bool],
) -> Pilot:
    """The same with what was loaded before, over `least` steps."""
    every = _snapshot_period(config)
    directions, source = parts.directions, parts.source
    if by_layer and isinstance(directions, BlockDirections):
        least = directions.num_blocks * math.ceil(least / directions.num_blocks)
    machine = _Machine(config, parts, surroundings)

    snapshot_due = due(every, source)
    first: list[StepCost] = []
    taken = None
    spent = False
    while not spent and (len(first) < least or (every is not None and (taken is None or len(first) < taken + 2))):
        cost = machine.step(len(first))
        if taken is None and cost.snapshot.forward_samples:
            taken = len(first)
        first.append(cost)
        spent = enough(cost, parts.ledger)
    second: list[StepCost] = []
    if every is not None and not spent:
        place = next(step for step in range(len(first), 10**9) if snapshot_due(step))
        second = [machine.step(place)]
    sizes = lru_cache(maxsize=None)(lambda index: Work.forward([source.batch([index])]))

    def batch(step: int) -> Work:
        return sum((sizes(index) for index in source.step_indices(step)), Work())

    return Pilot(parts.ledger, run_length(config, source), first, second, batch, source.batch_size, snapshot_due)


class _Machine:
    """Makes single steps, in any order, that leave the parameters as they are."""

    def __init__(self, config: RunConfig, parts: Parts, surroundings: Surroundings) -> None:
        loaded = (parts.objective, parts.parameters, parts.directions, parts.runtime, parts.source)
        self._source = parts.source
        most = micro_batch_size(config, *loaded, chosen=None)
        self._size = parts.runtime.evenly(self._source.batch_size, at_most=most)
        self._estimator: GradientEstimator = build_estimator(config, *loaded, surroundings)
        self._rule: UpdateRule = build_update_rule(config, parts.parameters, parts.directions)

    def step(self, step: int) -> StepCost:
        """The cost of a step."""
        source = self._source
        with memory_explained("a step", remedy="lower training.micro_batch_size, or train an adapter (model.adapter)"):
            began = time.perf_counter()
            snapshot = self._estimator.prepare(source, step)
            prepared = time.perf_counter()
            batches = micro_batches_of(source, source.step_indices(step), self._size)
            estimate = self._estimator.estimate(batches, step)
            self._rule.apply(estimate, learning_rate=0.0, step=step)
        return StepCost(snapshot, estimate.work, prepared - began, time.perf_counter() - prepared)


def _snapshot_period(config: RunConfig) -> Period | None:
    match config.method:
        case VamoConfig() | VamoLiteralConfig() | SvrgConfig() | ZoSvrgConfig():
            return config.method.snapshot.every
        case _:
            return None
