"""Where samples stand in the data, for messages."""

from collections.abc import Iterator, Sequence
from itertools import chain
from os.path import exists, expanduser
from pathlib import Path

from vamo_ft.config.data import DataSetConfig
from vamo_ft.core.errors import DataError
from vamo_ft.data.mixture import Origin
from vamo_ft.data.sources import local_files, numbered_lines, read_rows
from vamo_ft.data.splits import is_whole, select

__all__ = ["row_places", "sample_places"]


def sample_places(data_sets: Sequence[DataSetConfig], origins: Sequence[Origin]) -> list[list[str]]:
    """Where the rows of samples stand, of several data sets.

    Args:
        origins: of each sample.

    Raises:
        DataError: the data is not what it was when the rows were loaded.
    """
    found: dict[int, dict[int, str]] = {}
    for number, data_set in enumerate(data_sets):
        wanted = sorted({row for owner, rows in origins if owner == number for row in rows})
        found[number] = dict(zip(wanted, row_places(data_set, wanted), strict=True)) if wanted else {}
    return [[found[number][row] for row in rows] for number, rows in origins]


def row_places(config: DataSetConfig, indices: Sequence[int]) -> list[str]:
    """Where rows stand, reading the data again: `file:line` of JSON lines, else the file and the row, counted from 1.

    Raises:
        DataError: the data is not what it was when the rows were loaded.
    """
    path = Path(expanduser(config.path))
    if not exists(path):
        return [f"{config.path}, row {index + 1}" for index in indices]
    files = {name: chain.from_iterable(map(_places, some)) for name, some in local_files(path, config.split).items()}
    if config.split is None or is_whole(config.split):
        places: Iterator[str] = chain.from_iterable(files.values())
    else:
        places = select(config.split, {name: list(some) for name, some in files.items()}, place=str(path))
    found = dict(zip(range(max(indices) + 1), places, strict=False))
    if len(found) <= max(indices):
        raise DataError(f"{path}: has fewer rows than before")
    return [found[index] for index in indices]


def _places(file: Path) -> Iterator[str]:
    if file.suffix == ".jsonl":
        return (f"{file}:{number}" for number, line in numbered_lines(file) if line.strip())
    return (f"{file}, row {number}" for number, _ in enumerate(read_rows(file), start=1))
