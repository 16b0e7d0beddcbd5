"""`vamo-ft plan`: what a run needs, and whether it fits, before it starts."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from vamo_ft.assemble.devices import find_device
from vamo_ft.assemble.memory import Phase
from vamo_ft.assemble.plan import MethodPlan, Plan, build_plan
from vamo_ft.commands.console import logging_to, output_console
from vamo_ft.config.planned import other_methods
from vamo_ft.config.schema import RunConfig
from vamo_ft.config.sharing import why_not_shared
from vamo_ft.core.errors import UsageError
from vamo_ft.training.disk import gigabytes
from vamo_ft.training.progress import SilentProgress

__all__ = ["plan"]

_WIDTH = 100
_MIB = 1 << 20
_LONG_STOP = 30.0  # seconds, above which a machine that is taken away may not wait


def plan(
    config: RunConfig,
    *,
    gpu: str | None,
    processes: int,
    methods: str | None,
    tokens_per_second: float | None,
    measure: bool,
    use_cache: bool = True,
) -> None:
    """Prints the plan.

    Args:
        gpu: name of a GPU; None: the device of this machine.
        processes: that share the run out, each on a device of its own, or all in this machine's main memory.
        methods: names separated by commas, to set beside the configured one; None: all.
        tokens_per_second: speed of training.
        measure: find the speed out.
        use_cache: keep tokens, and take them from where they were kept.

    Raises:
        UsageError: an option cannot be read, or there is no plan for such a run.
        ConfigError: a method's name is none.
        DataError: model or data are not what the configuration says.
    """
    if measure and tokens_per_second is not None:
        raise UsageError("--measure: finds the speed out, and --tokens-per-second gives it; leave one out")
    device = find_device(gpu).shared_by(processes)
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    others, refused = other_methods(config, names)
    with logging_to(Console(stderr=True), quiet=True):
        found = build_plan(
            config,
            others=others,
            refused=refused,
            device=device,
            processes=processes,
            tokens_per_second=tokens_per_second,
            measure=measure,
            progress=SilentProgress(),
            use_cache=use_cache,
        )
    console = output_console(_WIDTH)
    config = found.config
    for line in _heading(found, config):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_memory_table(found.configured))
    for line in (*_fit(found, config), *_work(found), *_disk(found)):
        console.print(line, highlight=False, soft_wrap=True)
    if found.others:
        console.print()
        console.print(_methods_table(found))
    for name, reason in found.refused.items():
        console.print(f"{name}: {reason}", highlight=False, soft_wrap=True, markup=False)


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}"


def _heading(found: Plan, config: RunConfig) -> Iterator[str]:
    (shortest, median, longest), method = found.lengths, found.configured
    yield (
        f"{config.run.name}: {method.name} with {method.optimizer}, {method.work.steps:,} steps of "
        f"{config.training.batch_size} samples in micro-batches of {found.micro_batch_size}"
    )
    if found.stored is not None:
        yield f"{config.model.path} is stored in 4 bits: {found.stored}"
    yield f"the model is given {shortest:,} to {longest:,} tokens of a sample, of half of them at most {median:,}"
    if found.processes > 1:
        yield from _shared(found, config)
    elif config.training.fsdp:
        yield (
            "planned for one process, which holds all; --processes N plans one of several (training.fsdp), which holds "
            "its part"
        )
    yield "memory in MiB, beside what the program itself and its libraries hold:"


def _shared(found: Plan, config: RunConfig) -> Iterator[str]:
    batch = config.training.batch_size
    yield f"{found.processes:,} processes; of a step's {batch} samples the busiest takes {found.busiest}"
    if config.training.fsdp:
        yield (
            "each holds its part of weights, gradients and what the optimizer keeps, and puts layers together while "
            "they run; planned is the first, which holds most"
        )
    else:
        yield "each holds the whole model, and all that the optimizer and snapshots keep"


def _memory_table(method: MethodPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    memory = method.memory
    phases = memory.phases
    for phase in phases:
        table.add_column(phase.name, justify="right")

    def row(name: str, *sizes: int) -> None:
        if any(sizes):
            table.add_row(name, *map(_mib, sizes))

    row("weights", *[memory.weights - memory.adapter] * len(phases))
    row("adapter", *[memory.adapter] * len(phases))
    row("optimizer state", *[memory.optimizer] * len(phases))
    row("snapshot", *[memory.snapshot] * len(phases))
    row("summed gradients", *[memory.exchanged] * len(phases))
    row("compiler of the kernels", *[memory.compiler] * len(phases))
    row("gradients", *[phase.peak.gradients for phase in phases])
    row("parts put together", *[phase.peak.gathered for phase in phases])
    row("activations, probe buffers", *[phase.peak.activations for phase in phases])
    row("logits", *[phase.peak.logits for phase in phases])
    row("copies, temporaries", *[phase.copies for phase in phases])
    row("together", *[memory.kept + phase.total for phase in phases])
    return table


def _fit(found: Plan, config: RunConfig) -> Iterator[str]:
    memory, device = found.configured.memory, found.device
    share = f"peak {_mib(memory.peak)} MiB, in the {memory.highest.name}; {device.name} has {_mib(device.memory)} MiB"
    yield f"{share}: {'it fits' if found.fits else 'it does not fit'}"
    if memory.host:
        yield f"in host memory, or able to move there: {_mib(memory.host)} MiB, which the table does not count"
    if memory.streamed:
        layers = f"layers of {_mib(memory.streamed)} MiB together"
        yield f"on the host: {layers}, which every forward pass copies to the device"
    if found.largest is None:
        yield "not even a micro-batch of 1 sample fits"
    else:
        all_of_it = "the whole batch" if found.processes == 1 else "a process's whole share of the batch"
        whole = f", {all_of_it}" if found.largest >= found.share else ""
        yield f"largest micro-batch that fits: {found.largest} samples{whole}"
    if not found.fits:
        yield f"what to change: {'; '.join(_remedies(found, config, memory.highest))}"


def _remedies(found: Plan, config: RunConfig, phase: Phase) -> Iterator[str]:
    if found.largest is not None and found.largest < found.micro_batch_size:
        yield f"training.micro_batch_size: {found.largest}"
    if found.enough is not None:
        yield f"{found.enough} processes (--processes {found.enough})"
    if phase.name in ("snapshot", "evaluation"):
        yield f"training.forward_batch_tokens below {config.training.forward_batch_tokens}"
    if found.checkpointed is not None and found.checkpointed < found.configured.memory.peak:
        yield f"training.activation_checkpointing: true (peak {_mib(found.checkpointed)} MiB)"
    optimizer = config.optimizer
    if optimizer.name == "adamw" and not config.training.fsdp:
        yield f"optimizer.name: adamw_8bit{', or paged_adamw_8bit' if found.device.type == 'cuda' else ''}"
    if optimizer.master_weights:
        yield "optimizer.master_weights: false"
    if found.offloadable and found.device.type == "cuda":
        yield f"method.snapshot.offload: true ({_mib(found.offloadable)} MiB)"
    if config.model.adapter is None:
        yield "an adapter (model.adapter)"
    if config.model.dtype == "float32":
        yield "model.dtype: bfloat16"
    if found.device.type == "cuda" and not config.training.fsdp and not config.training.stream_layers:
        if config.why_not_streamed is None:
            yield "training.stream_layers: true"
        if why_not_shared(config) is None and config.training.micro_batch_size != "auto":
            yield "training.fsdp: true, on several devices"
    lighter = [each.name for each in found.others if each.memory.peak <= found.device.memory]
    if lighter:
        yield f"a method that fits: {', '.join(lighter)}"
    yield "data.max_length, shorter"


def _work(found: Plan) -> Iterator[str]:
    work = found.configured.work
    busiest = "" if found.processes == 1 else f", of which the busiest process makes {work.share:.1%}"
    yield (
        f"work: {work.spent.forward_samples:,} forward and {work.spent.backward_samples:,} backward evaluations of a "
        f"sample, snapshots included; {work.tokens:,} training tokens; {work.flops:.3g} FLOPs{busiest}"
    )
    if work.evaluations:
        yield f"evaluation: {work.evaluations} passes over the held-out data, {work.evaluation_flops:.3g} FLOPs"
    if found.seconds is None:
        yield "time: not known; --measure times some steps here, --tokens-per-second takes the speed of a similar run"
        return
    together = "" if found.processes == 1 else " by all processes, at the speed of one alone: exchange is not counted"
    yield f"time: {_duration(found.seconds)} of training ({work.tokens / found.seconds:,.0f} tokens/s{together})"
    if found.evaluation_seconds:
        yield f"      {_duration(found.evaluation_seconds)} of evaluation, at the same FLOPs/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _disk(found: Plan) -> Iterator[str]:
    disk = found.disk
    yield (
        f"disk: a checkpoint has {gigabytes(disk.checkpoint)}; the run needs {gigabytes(disk.needed)}, and "
        f"{gigabytes(disk.free)} are free{'' if disk.needed <= disk.free else ': it does not fit'}"
    )
    long = ": longer than many machines wait (30 s)" if disk.stop_seconds > _LONG_STOP else ""
    yield (
        f"stop: within {disk.stop_seconds:.0f} s of a signal (a checkpoint at {disk.rate / 1e6:,.0f} MB/s, and 5 s)"
        f"{long}"
    )


def _methods_table(found: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("method", "optimizer"):
        table.add_column(name)
    for name in ("peak MiB", "state", "snapshot", "highest part", "forward", "backward", "FLOPs", "fits"):
        table.add_column(name, justify="right")
    for each in (found.configured, *found.others):
        memory, work = each.memory, each.work
        table.add_row(
            each.name,
            each.optimizer,
            _mib(memory.peak),
            _mib(memory.optimizer),
            _mib(memory.snapshot),
            memory.highest.name,
            f"{work.spent.forward_samples:,}",
            f"{work.spent.backward_samples:,}",
            f"{work.flops:.3g}",
            "yes" if memory.peak <= found.device.memory else "no",
        )
    return table
