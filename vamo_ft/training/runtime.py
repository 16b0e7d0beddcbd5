"""The device and the processes of a run, as accelerate sees them."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.utils import _verify_param_shape_across_processes
from torch.nn.parallel import DistributedDataParallel

from vamo_ft.core.errors import UsageError, first_line
from vamo_ft.core.memory import memory_explained
from vamo_ft.core.protocols import Runtime
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.sharding import distribute, shard
from vamo_ft.core.stack import stacked_layers
from vamo_ft.training.processes import Processes, lost_processes_explained, world_size

__all__ = [
    "AcceleratedRuntime",
    "ShardedRuntime",
    "build_runtime",
    "connected",
    "memory_errors_explained",
    "refuse_launchers",
]

Item = TypeVar("Item")

_log = logging.getLogger("vamo_ft")

_OF_A_LAUNCHER = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}

_OF_ACCELERATE = {
    "USE_FSDP": ("FSDP", "training.fsdp: true shares the model out"),
    "MIXED_PRECISION": ("mixed precision", "model.dtype and training.autocast say it"),
    "DYNAMO_BACKEND": ("torch.compile", "model.compile: true compiles the layers"),
}
"""Settings of `accelerate launch` as it hands them on: what they are about, and what is read in their place."""

_connected: ContextVar[Processes | None] = ContextVar("connected", default=None)
"""Those of the block: to connect them again would wait for one that is gone by then."""

_LATEST = timedelta(minutes=30)
"""After the first process comes the last one to what devices exchange; long waits are on the host (`Processes`)."""


def refuse_launchers() -> None:
    """Of a command that uses one process.

    Raises:
        UsageError: a launcher started this one among several; told before any of them waits for another.
    """
    if (processes := world_size()) > 1:
        raise UsageError(
            f"started as one of {processes} processes, but this uses one; start it as a vamo-ft command instead of "
            "with a launcher (vamo-ft train alone takes several)"
        )


@contextmanager
def connected() -> Iterator[Processes | None]:
    """Within the block the processes that a launcher started are one run; None where there is no launcher.

    Raises:
        UsageError: they do not find each other.
    """
    if world_size() == 1:
        yield None
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UsageError(
            "accelerate launch is told to use DeepSpeed, which is not supported; start with --multi_gpu, and share a "
            "large model out with training.fsdp: true"
        )
    if missing := sorted(_OF_A_LAUNCHER - os.environ.keys()):  # without them everybody would wait for the others
        raise UsageError(
            f"started as one of {world_size()} processes (WORLD_SIZE), but {', '.join(missing)} is not set; start them "
            "with accelerate launch or torchrun"
        )
    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=_LATEST)
        processes = Processes()
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"this process does not find the {world_size() - 1} others ({first_line(error)}); "
            "start them with accelerate launch or torchrun"
        ) from error
    before = _connected.set(processes)
    try:
        with processes.ending_together():
            yield processes
    finally:
        _connected.reset(before)


def build_runtime(*, autocast: torch.dtype | None, fsdp: bool = False) -> Runtime:
    """The runtime of this process: on CUDA where it is there, else on the CPU (MPS lacks the float64 of the sums).

    Args:
        fsdp: several processes share the model out.

    Raises:
        UsageError: a launcher started this process among several, outside of `connected`.
    """
    processes = _connected.get()
    if processes is None:
        refuse_launchers()
    if processes is None or processes.is_main:
        _warn_of_what_is_not_read(fsdp=fsdp)
    if processes is None:  # accelerate would connect one process with itself where a launcher numbered it
        return LocalRuntime("cuda" if torch.cuda.is_available() else "cpu", autocast=autocast)
    device = PartialState().device  # on the CPU with the process's number, which tensors there do not have
    local = LocalRuntime(device if device.type == "cuda" else "cpu", autocast=autocast)
    return ShardedRuntime(processes, local) if fsdp else AcceleratedRuntime(processes, local)


@cache  # a rollback builds another runtime
def _warn_of_what_is_not_read(*, fsdp: bool) -> None:
    """`accelerate config` asks about more than devices; a run is told by its own file alone."""
    told = {name: os.environ.get(f"ACCELERATE_{name}", "no").lower() for name in _OF_ACCELERATE}
    for name, (what, instead) in _OF_ACCELERATE.items():
        if told[name] not in ("no", "false", "fp32") and not (fsdp and name == "USE_FSDP"):
            _log.warning("what accelerate is told of %s is not read; %s", what, instead)


class AcceleratedRuntime:
    """Several processes with one device each (implements `core.protocols.Runtime`).

    Gradients are summed by `DistributedDataParallel`, in the last backward pass of a step; everything else that
    processes exchange are scalars of samples, and flags.
    """

    def __init__(self, processes: Processes, local: LocalRuntime) -> None:
        self._processes = processes
        self._local = local
        self.is_main = processes.is_main
        self.sum_, self.largest_, self.from_main_ = processes.sum_, processes.largest_, processes.from_main_
        self.agreed, self.any = processes.agreed, processes.any

    @property
    def device(self) -> torch.device:
        """Where this process's model is."""
        return self._local.device

    def alone(self) -> LocalRuntime:
        """This process by itself."""
        return self._local

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return self._local.autocast()

    def backward(self, loss: Tensor) -> None:
        """Back-propagates a scalar."""
        with lost_processes_explained():
            self._local.backward(loss)

    @property
    def share(self) -> tuple[int, int]:
        """All of it."""
        return self._local.share

    def place(self, module: nn.Module) -> None:
        """Moves the whole."""
        self._local.place(module)

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module in a `DistributedDataParallel` that sums where others average; parameters become the main one's.

        Weights of the loss are those of the whole step, so that the sum is its gradient however samples are shared out.
        Values are sent tensor by tensor: DDP itself would join them first, half a gigabyte at a time.
        """
        self.any(False)  # one may have read its model much later
        with lost_processes_explained(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions give the argument another name
            wrapped = DistributedDataParallel(module, broadcast_buffers=False, init_sync=False)
            _verify_param_shape_across_processes(wrapped.process_group, list(module.parameters()))
            self.from_main_([tensor.detach() for tensor in (*module.parameters(), *module.buffers())])
        wrapped.register_comm_hook(None, _summed)
        return wrapped

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Sums gradients over the processes in the last pass alone."""
        assert isinstance(module, DistributedDataParallel)
        return nullcontext() if last else module.no_sync()

    def evenly(self, total: int, *, at_most: int) -> int:
        """So large that all processes have the same number of pieces, but for the last ones."""
        share = -(-total // self._processes.count)
        return -(-share // -(-share // at_most))

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every so many-th."""
        return items[self._processes.rank :: self._processes.count]

    def passes(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """`mine`; who has none takes part in the sum of gradients with a pass over the first, which does not count."""
        return [(item, True) for item in self.mine(items)] or [(items[0], False)]

    def rounds(self, items: Iterable[Item]) -> Iterator[tuple[Sequence[Item], Item | None, bool]]:
        """As many items at a time as there are processes."""
        rest = iter(items)
        while dealt := tuple(islice(rest, self._processes.count)):
            counts = self._processes.rank < len(dealt)
            yield dealt, dealt[self._processes.rank] if counts else self._spare(dealt), counts

    def _spare(self, dealt: Sequence[Item]) -> Item | None:
        """What to take in a round in which there is nothing for this process."""
        return None

    def differing(self, values: Callable[[], Tensor]) -> list[int]:
        """The places at which int64 values are not the same in all processes."""
        own = values()
        extremes = torch.stack([own, ~own])  # -1 - s: the largest of these tells the smallest of those
        self.largest_([extremes])
        places: list[int] = (extremes[0] != ~extremes[1]).nonzero().flatten().tolist()
        return places

    def within_step(self, stop_requested: Callable[[], bool]) -> Callable[[], bool]:
        """Nothing: processes have different numbers of passes, and stop together at the end of the step."""
        return lambda: False


class ShardedRuntime(AcceleratedRuntime):
    """Several processes, each of which holds some rows of every tensor of the model (FSDP2, see `core.sharding`).

    Every forward and backward pass puts layers together from all processes, so that all make the same number of passes,
    and a process without work of its own repeats another's.
    """

    @property
    def share(self) -> tuple[int, int]:
        """One part for each process."""
        return self._processes.rank, self._processes.count

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of forward passes, in each of which processes wait for each other."""
        with lost_processes_explained(), self._local.autocast():
            yield

    def place(self, module: nn.Module) -> None:
        """Shares the module out; who has it without values, on the meta device, gets the main process's."""
        hollow = any(parameter.device.type == "meta" for parameter in module.parameters())
        sent = self.any(hollow)
        whole = {name: each.data for name, each in module.named_parameters()} if sent and self.is_main else {}
        layers = stacked_layers(module)
        with lost_processes_explained():
            shard(module, layers, init_device_mesh(self.device.type, (self._processes.count,)))
        if hollow:
            module.to_empty(device=self.device)
        if sent:
            distribute(module, whole, self.from_main_)

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module: its backward passes sum gradients as they are."""
        return module

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Nothing: to sum gradients once a step, each process would have to hold all of them."""
        return nullcontext()

    def passes(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """`mine`, and the first item as often as it takes to keep in step."""
        own = [(item, True) for item in self.mine(items)]
        return own + [(items[0], False)] * (-(-len(items) // self._processes.count) - len(own))

    def differing(self, values: Callable[[], Tensor]) -> list[int]:
        """None: no two processes hold the same."""
        return []

    def _spare(self, dealt: Sequence[Item]) -> Item | None:
        return dealt[0]


def _summed(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's exchange of a part of the gradients, without its division by the number of processes."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def memory_errors_explained(phase: str) -> AbstractContextManager[None]:
    """`memory_explained` for all that no block within knows better; `phase` as in "out of memory in ..."."""
    return memory_explained(
        phase,
        remedy="lower training.micro_batch_size or training.forward_batch_tokens, or take model.dtype: bfloat16 or an "
        "adapter (model.adapter)",
    )
