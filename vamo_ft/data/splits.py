"""Parts of splits, as the datasets library writes them: `train[:1000]`, `train[10%:20%]`, `train+validation`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from vamo_ft.core.errors import DataError, first_line

__all__ = ["is_whole", "select", "split_names"]

Item = TypeVar("Item")


def is_whole(split: str) -> bool:
    """Whether it names one split and nothing more."""
    return re.fullmatch(r"[^\[\]+]*", split) is not None


def split_names(split: str) -> list[str]:
    """The splits that it takes from, each once."""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def select(split: str, items: Mapping[str, Sequence[Item]], *, place: str) -> Iterator[Item]:
    """The part that `split` describes.

    Args:
        items: by split, one for every row.
        place: the data set's name, for messages.

    Raises:
        DataError: it is not written as such a part, or reaches beyond the rows.
    """
    from datasets import ReadInstruction

    sizes = {name: len(rows) for name, rows in items.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{place}: split: '{split}' cannot be taken ({first_line(error, otherwise='not a split')}); write it "
            f"as 'train[:1000]', 'train[10%:20%]' or 'train+validation'"
        ) from error
    return chain.from_iterable(items[part.splitname][part.from_ : part.to] for part in parts)
