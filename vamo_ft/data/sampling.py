"""A few rows of a data set, drawn at random."""

from collections.abc import Callable

from vamo_ft.config.data import ClassificationFormat, DataSetConfig, FormatConfig
from vamo_ft.config.sampling import SampleConfig
from vamo_ft.core.errors import DataError
from vamo_ft.core.hashing import Domain, HashKey, permutation
from vamo_ft.data.rows import Rows
from vamo_ft.data.sources import load_rows
from vamo_ft.data.values import label_key, numbered, shown, value_of

__all__ = ["load_sampled_rows", "sample_rows"]


def load_sampled_rows(
    data_set: DataSetConfig,
    format: FormatConfig,
    *,
    offline: bool,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Rows:
    """The rows of a data set that its `sample` leaves.

    Raises:
        DataError: there is no such data, it cannot be read, or it has too few rows.
        StopRequested: between two rows.
    """
    rows = load_rows(data_set, offline=offline, stop_requested=stop_requested)
    return rows if data_set.sample is None else sample_rows(rows, data_set.sample, format)


def sample_rows(rows: Rows, config: SampleConfig, format: FormatConfig) -> Rows:
    """Rows in their order: the first ones, of all or of each class, of a permutation that the seed keys.

    Args:
        format: says where the class of a row stands.

    Raises:
        DataError: there are too few rows.
    """
    order: list[int] = permutation(len(rows), HashKey(config.seed, Domain.SAMPLE, 0, 0)).tolist()
    if config.size is not None:
        groups, size = {"data": order}, config.size
    else:
        assert config.per_class is not None
        groups, size = _by_class(rows, order, format), config.per_class
    for name, members in groups.items():
        if len(members) < config.skip + size:
            have = f"{len(members)} rows" if config.per_class is None else f"{len(members)} of class '{shown(name)}'"
            after = f" after {config.skip} are skipped" if config.skip else ""
            raise DataError(f"{rows.place}: the sample takes {size} rows{after}, and there are {have}")
    chosen = sorted(row for members in groups.values() for row in members[config.skip : config.skip + size])
    return Rows(rows.place, rows.columns, [rows.rows[row] for row in chosen], numbers=chosen)


def _by_class(rows: Rows, order: list[int], format: FormatConfig) -> dict[str, list[int]]:
    """The rows of each class, in `order`; those of a label that is no class are for the format to refuse."""
    if isinstance(format, ClassificationFormat):
        column, names = format.label, {}
    else:
        column, names = "label", {str(number): name for number, name in enumerate(format.classes)}
    groups: dict[str, list[int]] = {label_key(name): [] for name in format.classes}
    labels = [label_key(value_of(row, column, place=place)) for place, row in numbered(rows)]
    for row in order:
        groups.setdefault(names.get(labels[row], labels[row]), []).append(row)
    return groups
