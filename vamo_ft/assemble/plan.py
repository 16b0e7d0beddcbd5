"""Memory, work, time and disk of a run before it starts, from its data and an outline of its model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vamo_ft.assemble.devices import Device
from vamo_ft.assemble.memory import MemoryPlan, MemoryPlanner
from vamo_ft.assemble.parts import Parts, build_outline
from vamo_ft.assemble.pilot import Pilot, pilot_of, run_pilot
from vamo_ft.assemble.shares import Shares, shares_of
from vamo_ft.assemble.space import offloaded_bytes, optimizer_bytes, snapshot_bytes
from vamo_ft.assemble.stand_in import stand_in
from vamo_ft.assemble.stored import as_stored, why_not_stored
from vamo_ft.assemble.surroundings import Surroundings, checkpoint_may_be_due, due, run_length
from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.config.optimizer import PAGED
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.protocols import Progress
from vamo_ft.core.types import Work
from vamo_ft.models.export import saved_bytes
from vamo_ft.models.four_bits import FourBits, check_outline
from vamo_ft.training.disk import free_bytes, write_rate
from vamo_ft.training.pretended import pretended
from vamo_ft.training.space import SMALL_FILES

__all__ = ["DiskPlan", "MethodPlan", "Plan", "WorkPlan", "build_plan", "largest_fitting", "plan_work"]

_EXACT_STEPS = 256  # whose evaluations are counted one by one
_FEW_STEPS = 3  # of methods that are only set beside the configured one
_PROCESSES = (2, 4, 8, 16, 32, 64)  # that are tried; torch cuts outlines for hundreds of them in minutes
_GRACE = 5.0  # seconds of a stop beside the writing of its checkpoint


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """What a run spends, all processes together.

    Attributes:
        spent: in steps and snapshots.
        flops: of `spent`, by the ledger.
        tokens: of the training data, each step's once.
        evaluations: passes over the held-out data.
        evaluation_flops: of all of them.
        share: of `flops`, what falls to the process that makes most passes.
        evaluation_share: the same of `evaluation_flops`.
    """

    steps: int
    spent: Work
    flops: int
    tokens: int
    evaluations: int
    evaluation_flops: int
    share: float
    evaluation_share: float


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What a run writes.

    Attributes:
        checkpoint: bytes of one.
        needed: bytes of those that are there at a time, and of the final model.
        free: bytes on the disk of the run.
        rate: bytes a second that the disk takes.
    """

    checkpoint: int
    needed: int
    free: int
    rate: float

    @property
    def stop_seconds(self) -> float:
        """From a signal to the end of the process."""
        return self.checkpoint / self.rate + _GRACE


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """One method with its optimizer."""

    name: str
    optimizer: str
    memory: MemoryPlan
    work: WorkPlan


@dataclass(frozen=True, slots=True)
class Plan:
    """What is shown.

    Attributes:
        config: the file's, with `model.quantization` where the base is stored so.
        stored: how the base's files hold it in 4 bits; None: they do not.
        configured: the file's own method.
        others: methods beside it.
        refused: method -> why it does not go with this configuration.
        processes: that share the run out; memory is that of the one that holds most.
        busiest: samples of a step that the one with most passes takes, in micro-batches of `micro_batch_size`.
        share: samples that one takes in a single micro-batch, where nothing makes it smaller.
        largest: most samples of a micro-batch, up to `share`, with which the run fits; None: not even one.
        checkpointed: the peak with activation checkpointing, where the run does not fit without.
        enough: the smallest power of two of processes with which a micro-batch of one sample fits, where with
            `processes` it does not and they share the model out; None: it was not looked for, or is above 64.
        seconds: of training; None: no speed is known.
        evaluation_seconds: of evaluation.
        lengths: (shortest, median, longest) sample in tokens.
        offloadable: bytes on the device that a snapshot could keep in host memory.
    """

    config: RunConfig
    stored: FourBits | None
    configured: MethodPlan
    others: tuple[MethodPlan, ...]
    refused: Mapping[str, str]
    device: Device
    processes: int
    busiest: int
    share: int
    micro_batch_size: int
    largest: int | None
    checkpointed: int | None
    enough: int | None
    seconds: float | None
    evaluation_seconds: float | None
    disk: DiskPlan
    lengths: tuple[int, int, int]
    offloadable: int

    @property
    def fits(self) -> bool:
        """Whether the run does, as configured."""
        return self.configured.memory.peak <= self.device.memory


def build_plan(
    config: RunConfig,
    *,
    others: Mapping[str, RunConfig],
    refused: Mapping[str, str],
    device: Device,
    processes: int,
    tokens_per_second: float | None,
    measure: bool,
    progress: Progress,
    use_cache: bool = True,
) -> Plan:
    """Plans a run; reads no weights, but to measure.

    Args:
        others: methods to set beside the configured one, on the same model and data.
        refused: methods that do not go with them, and why.
        device: of each process.
        processes: that share the run out.
        tokens_per_second: of training data, as a run of one process logs it.
        measure: load the model and time some steps.
        use_cache: keep tokens, and take them from where they were kept.

    Raises:
        UsageError: there is no plan for such a run.
        DataError: model or data are not what the configuration says.
        SaveError: nothing can be written to the run's disk.
    """
    if isinstance(config.objective, MetricObjectiveConfig):
        raise UsageError("objective.type: passes of a metric are not planned; try --set 'objective={type: loss}'")
    name = config.optimizer.name
    if name in PAGED and device.type != "cuda":
        raise UsageError(f"optimizer.name: {name} needs a CUDA device; write {PAGED[name]}, or plan for one with --gpu")
    surroundings = Surroundings(progress=progress, stop_requested=lambda: False)
    with pretended(processes) as together:
        parts = build_outline(config, use_cache=use_cache, processes=together)
        if (held := parts.loaded.four_bits) is not None:
            check_outline(held, path=config.model.path, on_cpu=device.type == "cpu")
            config = as_stored(config, held)
            reasons = {name: why_not_stored(each, held) for name, each in others.items()}
            refused = {**refused, **{name: why.partition(";")[0] for name, why in reasons.items() if why is not None}}
            others = {name: as_stored(each, held) for name, each in others.items() if reasons[name] is None}
        planner = MemoryPlanner(config, parts, device_type=device.type)
        source = parts.source
        share = parts.runtime.evenly(source.batch_size, at_most=source.batch_size)

        def fits(size: int) -> bool:
            return planner.plan(config, micro_batch_size=size).peak <= device.memory

        largest = largest_fitting(fits, share)
        asked = config.training.micro_batch_size
        most = (largest or 1) if asked == "auto" else min(asked or source.batch_size, source.batch_size)
        size = parts.runtime.evenly(source.batch_size, at_most=most)

        def planned(name: str, each: RunConfig, least: int) -> MethodPlan:
            memory, shares = planner.plan(each, micro_batch_size=size), shares_of(each, parts, micro_batch_size=size)
            work = plan_work(each, parts, surroundings, least=least, shares=shares)
            return MethodPlan(name, each.optimizer.name, memory, work)

        busiest = round(shares_of(config, parts, micro_batch_size=size).step * source.batch_size)
        configured = planned(config.method.name, config, _EXACT_STEPS)
        beside = tuple(planned(name, each, _FEW_STEPS) for name, each in others.items())
        checkpointed = None
        if configured.memory.peak > device.memory and not config.training.activation_checkpointing:
            training = config.training.model_copy(update={"activation_checkpointing": True})
            lighter = config.model_copy(update={"training": training})
            outline = build_outline(lighter, use_cache=use_cache, processes=together)
            again = MemoryPlanner(lighter, outline, device_type=device.type)
            checkpointed = again.plan(lighter, micro_batch_size=size).peak
    enough = None
    if largest is None and config.training.fsdp and device.type == "cuda":
        enough = _enough_processes(config, device, above=processes, use_cache=use_cache)
    work, alone = configured.work, None
    if tokens_per_second is not None:
        alone = work.tokens / tokens_per_second
    elif measure:
        alone = _measured_seconds(config, surroundings)
    lengths = sorted(source.length(index) for index in range(source.num_samples))
    snapshot = snapshot_bytes(config, parts.parameters, num_samples=0, whole=False)
    return Plan(
        config=config,
        stored=held if held is not None and held.stored else None,
        configured=configured,
        others=beside,
        refused=refused,
        device=device,
        processes=processes,
        busiest=busiest,
        share=share,
        micro_batch_size=size,
        largest=largest,
        checkpointed=checkpointed,
        enough=enough,
        seconds=None if alone is None else alone * work.share,
        evaluation_seconds=None
        if alone is None
        else alone * work.evaluation_flops / work.flops * work.evaluation_share,
        disk=_disk(config, parts),
        lengths=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        offloadable=snapshot - offloaded_bytes(config, parts.parameters, whole=False),
    )


def _enough_processes(config: RunConfig, device: Device, *, above: int, use_cache: bool) -> int | None:
    """The smallest power of two, above so many, with which a micro-batch of one sample fits."""
    for count in _PROCESSES:
        if count <= above:
            continue
        with pretended(count) as together:
            parts = build_outline(config, use_cache=use_cache, processes=together)
            memory = MemoryPlanner(config, parts, device_type=device.type).plan(config, micro_batch_size=1)
        if memory.peak <= device.memory:
            return count
        if max(phase.peak.gathered + phase.peak.logits for phase in memory.phases) > device.memory:
            return None  # of which no process is relieved by others
    return None


def largest_fitting(fits: Callable[[int], bool], limit: int) -> int | None:
    """The largest number from 1 to `limit` that fits, where none above one that does not fit does; None: not even 1."""
    if fits(limit):
        return limit
    low, high = 0, limit  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def plan_work(
    config: RunConfig, parts: Parts, surroundings: Surroundings, *, least: int, shares: Shares | None = None
) -> WorkPlan:
    """Evaluations and operations of a whole run, counted on a stand-in for the model.

    Args:
        parts: an outline.
        least: steps that are counted one by one; later ones follow from them, see `Pilot`.
        shares: of the process that makes most passes; None: all of them.
    """
    shares = Shares() if shares is None else shares
    length = run_length(config, parts.source)
    small, loaded = stand_in(config, parts)
    pilot = pilot_of(
        small,
        loaded,
        surroundings,
        least=min(least, length),
        by_layer=least >= _EXACT_STEPS or length < least,
        enough=lambda cost, ledger: False,
    )
    costs = [pilot.cost(step) for step in range(length)]
    snapshots, steps = _sum([cost.snapshot for cost in costs]), _sum([cost.update for cost in costs])
    spent, flops = snapshots + steps, parts.ledger.flops
    busiest = shares.snapshot * flops(snapshots) + shares.step * flops(steps)
    tokens = sum(parts.source.length(index) for step in range(length) for index in parts.source.step_indices(step))
    evaluations, evaluated = 0, Work()
    if parts.held_out is not None:
        evaluate = due(config.evaluation.every, parts.source)
        evaluations = 2 + sum(evaluate(step) for step in range(1, length))
        for batch in parts.held_out.batches(token_budget=config.training.forward_batch_tokens):
            evaluated += Work.forward([batch])
    return WorkPlan(
        steps=length,
        spent=spent,
        flops=flops(spent),
        tokens=tokens,
        evaluations=evaluations,
        evaluation_flops=evaluations * flops(evaluated),
        share=busiest / flops(spent),
        evaluation_share=shares.evaluation,
    )


def _measured_seconds(config: RunConfig, surroundings: Surroundings) -> float:
    pilot: Pilot = run_pilot(config, surroundings, timed=True, by_layer=False, enough=lambda cost, ledger: False)
    costs = [pilot.cost(step) for step in range(pilot.length)]
    return math.fsum(cost.snapshot_seconds + cost.update_seconds for cost in costs)


def _disk(config: RunConfig, parts: Parts) -> DiskPlan:
    root = Path(config.run.output_dir) / config.run.name
    parameters, samples = parts.parameters, parts.source.num_samples
    model = saved_bytes(parts.loaded.model) + SMALL_FILES
    state = optimizer_bytes(config.optimizer, parameters) + snapshot_bytes(config, parameters, num_samples=samples)
    keep = config.checkpoint.keep + (config.evaluation.ranked_by is not None)
    length, may_be_due = run_length(config, parts.source), checkpoint_may_be_due(config, parts.source)
    saves = sum(may_be_due(step) or step == length for step in range(1, length + 1))
    there = min(keep + 1, saves)
    return DiskPlan(model + state, there * (model + state) + model, free_bytes(root), write_rate(root))


def _sum(works: Sequence[Work]) -> Work:
    totals = dict.fromkeys(Work().state_dict(), 0)
    for work in works:
        for name, count in work.state_dict().items():
            totals[name] += count
    return Work(**totals)
