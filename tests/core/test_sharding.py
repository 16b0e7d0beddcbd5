import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from vamo_ft.assemble.space import optimizer_bytes
from vamo_ft.config.optimizer import OptimizerConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.sharding import Part, rows_of, shard


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 8, 9])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_rows_are_dealt_out_as_torch_chunks_them(count: int, processes: int) -> None:
    """FSDP2 cuts a parameter by `torch.chunk`, with nothing for processes that no chunk is left for."""
    chunks = torch.arange(count).chunk(processes) if count else ()
    for rank in range(processes):
        rows = rows_of(count, rank=rank, processes=processes)
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(rows.start, rows.stop)) == expected


def test_a_part_knows_the_size_of_the_whole() -> None:
    assert Part(torch.zeros(2, 3, 5), dim=1, size=7).whole_bytes == 4 * 2 * 7 * 5


def test_parameters_that_are_not_shared_out_are_saved_as_they_are() -> None:
    parameters = TrainableParameters(nn.Linear(3, 2))
    tensor = torch.arange(6.0).view(2, 3)
    assert not parameters.sharded
    assert parameters.registered == parameters.tensors
    assert parameters.extents == ((0, 2), (2, 8))
    assert (parameters.nbytes, parameters.num_held) == (32, 8)
    assert parameters.saved(1, tensor) is tensor
    assert parameters.own(1, tensor) is tensor
    assert parameters.total(tensor) is tensor


@pytest.fixture
def second_of_two() -> Iterator[DeviceMesh]:
    """The processes as the second one sees them; the first one sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hollow", [False, True])
def test_the_first_pass_leaves_rows_where_they_are(hollow: bool, second_of_two: DeviceMesh) -> None:
    """Also where the processes do not hold equally many, so that FSDP2 fills them up in memory of its own."""
    with torch.device("meta" if hollow else "cpu"):
        module = nn.Linear(3, 5)
    shard(module, [], second_of_two)
    if hollow:
        module.to_empty(device="cpu")
    parameters = TrainableParameters(module)
    module(torch.ones(1, 3))
    assert [len(own) for own in parameters.tensors] == [2, 2]
    places = [tensor.data_ptr() for tensor in parameters.tensors]
    assert places == [local(dict(module.named_parameters())[name]).data_ptr() for name in parameters.names]


def local(parameter: Any) -> Tensor:
    tensor: Tensor = parameter.to_local()
    return tensor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.head = nn.Linear(2, 2)


def shared_between_layers(model: Any) -> None:
    model.layers[1].weight = model.layers[0].weight


def shared_with_the_head(model: Any) -> None:
    model.head.weight = model.layers[0].weight


def single_number(model: Any) -> None:
    model.head.scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)


def two_precisions(model: Any) -> None:
    model.layers[0].double()
    model.layers[1].bias = nn.Parameter(model.layers[1].bias.bfloat16())


SHARED = "belongs to several layers of the model, or to one and to something around them, and is put together with one"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shared_between_layers, f"training.fsdp: layers.0.weight {SHARED} of them; leave training.fsdp out"),
        (shared_with_the_head, f"training.fsdp: layers.0.weight {SHARED} of them; leave training.fsdp out"),
        (
            single_number,
            "training.fsdp: head.scale is a single number, which cannot be shared out; leave training.fsdp out",
        ),
        (
            two_precisions,
            "training.fsdp: layers.1.weight is trained in float32 and layers.1.bias in bfloat16, and their gradients "
            "are summed together; write model.dtype: float32, or leave training.fsdp out",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(change: Any, said: str, second_of_two: DeviceMesh) -> None:
    model = Model()
    change(model)
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        shard(model, model.layers, second_of_two)


def test_master_weights_are_counted_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds the whole, whatever rows of it a process has."""
    parameters = TrainableParameters(nn.Linear(6, 4).to(torch.bfloat16))
    rows = tuple(nn.Parameter(tensor[: len(tensor) // 2].detach()) for tensor in parameters.tensors)
    config = OptimizerConfig(name="adamw", learning_rate=1.0, master_weights=True)
    monkeypatch.setattr(parameters, "tensors", rows)
    assert optimizer_bytes(config, parameters) == (8 + 4) * 28
