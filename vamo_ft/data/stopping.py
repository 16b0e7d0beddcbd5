"""Stops while data is read."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from vamo_ft.core.errors import StopRequested

__all__ = ["until_stopped"]

Item = TypeVar("Item")


def until_stopped(items: Iterable[Item], stop_requested: Callable[[], bool]) -> Iterator[Item]:
    """The items, as long as no stop is asked for.

    Raises:
        StopRequested: between two items.
    """
    for item in items:
        if stop_requested():
            raise StopRequested("nothing to save yet: stopped in the preparation of the data")
        yield item
