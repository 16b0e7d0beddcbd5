"""Cuts the samples of a step into what is passed over at one time."""

from collections.abc import Sequence

from vamo_ft.core.protocols import SampleSource
from vamo_ft.core.types import Batch

__all__ = ["micro_batches_of"]


def micro_batches_of(source: SampleSource, indices: Sequence[int], size: int) -> list[Batch]:
    """The samples in batches of `size`; the last one has what is left."""
    return [source.batch(indices[start : start + size]) for start in range(0, len(indices), size)]
