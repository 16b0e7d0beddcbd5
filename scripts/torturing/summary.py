"""What was survived, as tables."""

from collections import Counter
from collections.abc import Iterable, Sequence

from scripts.torturing.rounds import RoundResult

__all__ = ["summary"]


def summary(results: Sequence[RoundResult], *, cases: Sequence[str]) -> str:
    """Attacks by case, attacks by place, and the processes it took."""
    by_case: Counter[tuple[str, str]] = Counter()
    by_place: Counter[tuple[str, str]] = Counter()
    starts: Counter[str] = Counter()
    for result in results:
        starts.update(result.starts)
        for attack, place in result.hits:
            by_case[attack, result.plan.case] += 1
            by_place[attack, place] += 1
    lost = sum(result.loss is not None for result in results)
    processes = sum(starts.values())
    return "\n\n".join(
        [
            _table("attack", by_case, columns=cases),
            _table("attack, and where it came", by_place, columns=sorted({place for _, place in by_place})),
            f"{len(results)} rounds, {by_case.total()} attacks, {processes} processes ("
            + ", ".join(f"{count} {name}" for name, count in sorted(starts.items()))
            + f"), {processes - len(results)} of them resumes or refusals; {lost} rounds lost something",
        ]
    )


def _table(title: str, counts: Counter[tuple[str, str]], *, columns: Iterable[str]) -> str:
    columns = list(columns)
    rows = [[title, *columns, "all"]]
    for name in sorted({name for name, _ in counts}):
        row = [counts[name, column] for column in columns]
        rows.append([name, *map(_number, row), str(sum(row))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _number(count: int) -> str:
    return str(count) if count else "."
