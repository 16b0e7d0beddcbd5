"""Modules whose tensors are shared out over processes (FSDP2): each process holds some rows of every one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from vamo_ft.core.errors import UsageError

__all__ = ["Part", "Rows", "distribute", "own_part", "rows_of", "shard", "whole_tensor"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows [start, stop) of `count`, in the first dimension of a tensor, that one process holds."""

    start: int
    stop: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """This process's rows of a tensor, in a state that all processes save together.

    Attributes:
        tensor: the rows alone.
        dim: the dimension in which the whole tensor is cut.
        size: its length there.
    """

    tensor: Tensor
    dim: int
    size: int

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole tensor, in a process that holds rows of it."""
        return self.tensor.nbytes // max(1, self.tensor.shape[self.dim]) * self.size


def rows_of(count: int, *, rank: int, processes: int) -> Rows:
    """The rows that fall to a process, as FSDP2 deals them out: equally many to each, fewer or none to the last."""
    share = -(-count // processes)
    return Rows(min(rank * share, count), min((rank + 1) * share, count), count)


def shard(root: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shares out the parameters of a module in place, each of its layers as a unit and the rest as another.

    A unit is put together from all processes before it runs, forward and backward, and given up afterwards, the root's
    too. So the rows that a process holds are all there is between passes, and what is written to them is what the next
    pass computes with. Gradients are summed over the processes, where others average. Every pass is collective.

    Args:
        root: the module that is called; on the host or the mesh's device, to which its rows go, layer by layer.
        layers: modules within it.
        mesh: the processes, in one dimension.

    Raises:
        UsageError: it has parameters that cannot be shared out so.
    """
    layers = list(layers)
    _check_units(root, layers)
    for unit in (*layers, root):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # else a product with 1, which gloo cannot form


def distribute(module: nn.Module, whole: Mapping[str, Tensor], send: Callable[[Sequence[Tensor]], None]) -> None:
    """Gives every process its rows of the main one's parameters, and the buffers, one tensor at a time; collective.

    Args:
        module: shared out by `shard`; in processes that had no values to begin with these are undefined.
        whole: in the main process the values by name, wherever they are; elsewhere empty.
        send: replaces tensors by the main process's.
    """
    for name, parameter in module.named_parameters():
        local, rows = _local(parameter.detach()), _rows(parameter)
        values = whole[name].to(local.device).contiguous() if whole else local.new_empty(parameter.shape)
        send([values])
        local.copy_(values[rows.start : rows.stop])
    for buffer in module.buffers():
        send([buffer])


def own_part(parameter: nn.Parameter) -> tuple[nn.Parameter, Rows | None]:
    """What a process trains of a parameter.

    Returns:
        the parameter, or its rows here, which share memory with it and get its gradient; and which rows these are, or
        None where the parameter is not shared out.
    """
    if not isinstance(parameter, DTensor):
        return parameter, None
    rows = _rows(parameter)
    own = nn.Parameter(_local(parameter.detach()))
    assert len(own) == rows.stop - rows.start

    def hand_over(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = _local(parameter.grad)
        if own.grad is None:
            own.grad = gradient
        else:
            own.grad += gradient
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
    return own, rows


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor, put together from all processes where it is shared out; collective then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check_units(root: nn.Module, layers: Sequence[nn.Module]) -> None:
    """A unit's gradients are summed in one buffer, and a tensor belongs to one unit."""
    within = {part for layer in layers for part in layer.modules()}
    around = [p for part in root.modules() if part not in within for p in part.parameters(recurse=False)]
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    seen: set[int] = set()
    for unit in (*([*layer.parameters()] for layer in layers), around):
        trained: dict[torch.dtype, str] = {}
        for parameter in {id(each): each for each in unit}.values():
            name = names[id(parameter)]
            if id(parameter) in seen:
                raise UsageError(
                    f"training.fsdp: {name} belongs to several layers of the model, or to one and to something around "
                    "them, and is put together with one of them; leave training.fsdp out"
                )
            if parameter.ndim == 0:
                raise UsageError(
                    f"training.fsdp: {name} is a single number, which cannot be shared out; leave training.fsdp out"
                )
            if parameter.requires_grad:
                trained.setdefault(parameter.dtype, name)
            seen.add(id(parameter))
        if len(trained) > 1:
            (first, one), (second, other), *_ = trained.items()
            raise UsageError(
                f"training.fsdp: {one} is trained in {_plain(first)} and {other} in {_plain(second)}, and their "
                "gradients are summed together; write model.dtype: float32, or leave training.fsdp out"
            )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(tensor: Tensor) -> Rows:
    assert isinstance(tensor, DTensor)
    return rows_of(len(tensor), rank=tensor.device_mesh.get_local_rank(), processes=tensor.device_mesh.size())


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
