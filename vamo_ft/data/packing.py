"""Fills rows up to a length with several short documents."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from vamo_ft.data.examples import TokenizedData, TokenWriter

__all__ = ["pack"]


def pack(data: TokenizedData, *, max_length: int) -> TokenizedData:
    """The samples of `data` as documents of fewer, longer samples, each within `max_length` tokens.

    Best-fit decreasing: from the longest document to the shortest, each goes where it leaves the least room, ties to
    the sample that has had so much room for longest. Documents keep their order within a sample, and samples that of
    their first documents, so that the result depends on `data` and the length alone. Nothing is cut, and labels,
    options and references, which belong to single documents, are left out.
    """
    lengths = [data.length(index) for index in range(len(data))]
    bins = sorted(sorted(each) for each in _best_fit_decreasing(lengths, capacity=max_length))
    writer = TokenWriter()
    for members in bins:
        documents = [data[index] for index in members]
        ends = list(accumulate(len(document.token_ids) for document in documents))
        starts = [0, *ends[:-1]]
        writer.append(
            [token for document in documents for token in document.token_ids],
            tuple(
                (offset + start, offset + end)
                for offset, document in zip(starts, documents, strict=True)
                for start, end in document.supervised
            ),
            documents=tuple(ends) if len(ends) > 1 else (),
            rows=tuple(data.rows_of(index)[0] for index in members),
        )
    packed = writer.finish()
    return replace(packed, num_truncated=data.num_truncated, num_skipped=data.num_skipped)


def _best_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    with_room: dict[int, deque[int]] = {}  # room -> bins that have so much left, the longest so first
    rooms: list[int] = []  # keys of with_room, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].popleft()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[chosen].append(index)
        left = room - lengths[index]
        if left not in with_room:
            with_room[left] = deque()
            insort(rooms, left)
        with_room[left].append(chosen)
    return bins
