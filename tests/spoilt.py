"""Runs like those of `tests.shards` of which step 5 diverges, whichever of its samples a process has.

python -m tests.spoilt FILE PORT FILE PORT ...
"""

import pytest

from tests.shards import train_all
from tests.test_divergence import ORDER, spoil
from vamo_ft.core.types import Batch

PARTS = [ORDER.step_indices(4)[start : start + 3] for start in (0, 3)]
"""Its micro-batches, of three samples each."""


def is_part(batch: Batch) -> bool:
    return batch.indices in PARTS


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, is_part)
        train_all()
