import pytest
import torch
from torch import nn

from vamo_ft.assemble.space import optimizer_bytes
from vamo_ft.config.optimizer import OptimizerConfig
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.sharding import Part, rows_of


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


def test_master_weights_are_counted_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds the whole, whatever rows of it a process has."""
    parameters = TrainableParameters(nn.Linear(6, 4).to(torch.bfloat16))
    rows = tuple(nn.Parameter(tensor[: len(tensor) // 2].detach()) for tensor in parameters.tensors)
    config = OptimizerConfig(name="adamw", learning_rate=1.0, master_weights=True)
    monkeypatch.setattr(parameters, "tensors", rows)
    assert optimizer_bytes(config, parameters) == (8 + 4) * 28
