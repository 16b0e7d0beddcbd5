"""State whose tensors several processes hold parts of, on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vamo_ft.core.sharding import Part, rows_of
from vamo_ft.training.state_files import read_state, split_state, write_parts, write_state

WHOLE = {
    "matrix": (torch.arange(35.0).view(7, 5), 0),
    "basis": (torch.arange(2 * 3 * 4, dtype=torch.bfloat16).view(2, 3, 4), 1),
    "vector": (torch.arange(1.0), 0),
}


def state(rank: int, processes: int) -> dict[str, Any]:
    def part(tensor: Tensor, dim: int) -> Part:
        rows = rows_of(tensor.shape[dim], rank=rank, processes=processes)
        return Part(tensor.narrow(dim, rows.start, rows.stop - rows.start), dim, tensor.shape[dim])

    return {"step": torch.tensor(3.0), "list": [{name: part(*whole) for name, whole in WHOLE.items()}], "text": "x"}


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
@pytest.mark.parametrize("read_by", [1, 2, 4, 5])
def test_any_number_of_processes_reads_what_any_number_saved(saved_by: int, read_by: int, tmp_path: Path) -> None:
    write_state(tmp_path, "owner", split_state("owner", state(0, saved_by)))
    for rank in range(1, saved_by):
        write_parts(tmp_path, "owner", split_state("owner", state(rank, saved_by)), rank=rank)
    for rank in range(read_by):
        found = read_state(tmp_path, "owner", share=(rank, read_by))
        assert (found["step"], found["text"]) == (3.0, "x")
        for name, (whole, dim) in WHOLE.items():
            chunks = whole.chunk(read_by, dim)
            expected = chunks[rank] if rank < len(chunks) else whole.narrow(dim, 0, 0)
            assert found["list"][0][name].dtype == whole.dtype
            assert torch.equal(found["list"][0][name], expected)


def test_what_one_process_holds_is_not_written_twice(tmp_path: Path) -> None:
    write_parts(tmp_path, "owner", split_state("owner", {"step": torch.tensor(3.0)}), rank=1)
    assert list(tmp_path.iterdir()) == []
