"""Data sets of the Hub, whole or as a stream of which the first rows are read."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vamo_ft.config.data import DataSetConfig
from vamo_ft.core.errors import DataError, StopRequested, first_line
from vamo_ft.data.rows import Rows
from vamo_ft.data.stopping import until_stopped

__all__ = ["load_hub"]


def load_hub(config: DataSetConfig, *, offline: bool, stop_requested: Callable[[], bool]) -> Rows:
    """The rows of a Hub data set, or the first `limit` ones.

    Args:
        offline: make no network call; the data set must be in the local cache.
        stop_requested: asked at every row of a stream.

    Raises:
        StopRequested: between two rows.
        DataError: there is no such data, or it cannot be read.
    """
    import datasets

    if config.streaming and offline:
        raise DataError(f"{config.path}: run.offline forbids streaming; leave it out to take the cached copy")
    try:
        if config.streaming:
            return _stream(config, stop_requested)
        with _hub_offline(offline):
            rows = datasets.load_dataset(
                config.path, config.name, split=config.split or "train", revision=config.revision
            )
    except StopRequested:
        raise
    except (ConnectionError, FileNotFoundError) as error:
        reason = "run.offline forbids a download" if offline else first_line(error)
        raise DataError(
            f"{config.path}: no file or folder here, and not in the cache of Hub data sets; {reason}"
        ) from error
    except Exception as error:
        raise DataError(f"{config.path}: cannot be loaded from the Hub ({first_line(error)})") from error
    if offline and config.revision is not None:
        _check_cached_revision(config.path, config.revision, files=[entry["filename"] for entry in rows.cache_files])
    if config.limit is not None:
        rows = rows.select(range(min(config.limit, len(rows))))
    return Rows(config.path, tuple(rows.column_names), rows, identity=rows._fingerprint)


def _stream(config: DataSetConfig, stop_requested: Callable[[], bool]) -> Rows:
    import datasets

    assert config.limit is not None
    stream = datasets.load_dataset(
        config.path, config.name, split=config.split or "train", revision=config.revision, streaming=True
    )
    rows = list(until_stopped(stream.take(config.limit), stop_requested))
    return Rows(config.path, tuple(dict.fromkeys(name for row in rows for name in row)), rows)


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """The library knows offline mode only as a process-wide setting, read from the environment at import."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _check_cached_revision(path: str, revision: str, *, files: Iterable[str]) -> None:
    """Offline, the library takes the newest cached version whatever the revision; its folder names the commit."""
    commits = {Path(file).parent.name for file in files}
    if commits != {revision}:
        raise DataError(
            f"{path}: offline, revision '{revision}' is not the cached commit {', '.join(sorted(commits))}; "
            "write that commit, or leave revision out"
        )
