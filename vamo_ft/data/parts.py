"""Two halves of the held-out data: one to choose settings by, one to report."""

from typing import Literal

from vamo_ft.core.errors import DataError
from vamo_ft.core.hashing import Domain, HashKey, permutation

__all__ = ["Part", "part_indices"]

Part = Literal["tune", "test"]


def part_indices(num_samples: int, part: Part) -> list[int]:
    """The samples of a half, ascending: `tune` has the first half of a fixed permutation, `test` the rest.

    The permutation depends on the number of samples alone, so that runs of any seed and method share the halves.

    Raises:
        DataError: there are too few samples.
    """
    if num_samples < 2:
        raise DataError(f"data.evaluation: {num_samples} sample cannot be split (evaluation.part); add more rows")
    order = permutation(num_samples, HashKey(0, Domain.PART, 0, 0)).tolist()
    half = num_samples // 2
    return sorted(order[:half] if part == "tune" else order[half:])
