"""Processes that do not exist, for what only has to be known of one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vamo_ft.training.processes import Processes

__all__ = ["PretendedProcesses", "pretended"]


class PretendedProcesses(Processes):
    """The first of some processes, with nobody behind the others: what is sent arrives nowhere, and nothing comes back.

    Collective calls return at once, with what this process put in where the others' would come from. So it runs the
    code of one process among many, on outlines of tensors, whose values nobody asks for. It is the one that holds and
    does most: shares are rounded up, and the last processes get less.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._host = dist.group.WORLD
        self._heartbeat = None


@contextmanager
def pretended(count: int) -> Iterator[PretendedProcesses | None]:
    """Within the block this process is the first of `count`; None where that is the only one."""
    if count == 1:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield PretendedProcesses()
    finally:
        dist.destroy_process_group()
