"""What a run leaves behind, and how it differs from what another one left."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "differences", "read_outcome", "read_status", "tree_digest"]

_OF_THE_CLOCK = {"seconds", "tokens_per_second", "peak_memory_bytes", "eval.seconds"}
_OF_THE_PAST = {"metrics.discarded.jsonl"}
"""Files that only a run with a past has."""


@dataclass(frozen=True)
class Outcome:
    """A run directory, without what depends on the clock.

    Attributes:
        state: of status.json; None where there is none.
        weights: file -> SHA-256, of the final model's safetensors.
        metrics: the lines of metrics.jsonl, as JSON without times and memory.
        seed_log: SHA-256 of seedlog.bin, where there is one.
        files: what lies in the run directory, in its final model and in its newest checkpoint.
    """

    state: str | None
    weights: dict[str, str]
    metrics: tuple[str, ...]
    seed_log: str | None
    files: frozenset[str]


def read_outcome(directory: Path) -> Outcome:
    """What is in a run directory."""
    status = read_status(directory)
    seed_log = directory / "seedlog.bin"
    return Outcome(
        state=None if status is None else status["state"],
        weights={file.name: _sha256(file) for file in sorted((directory / "model").glob("*.safetensors"))},
        metrics=tuple(_lines(directory / "metrics.jsonl")),
        seed_log=_sha256(seed_log) if seed_log.exists() else None,
        files=frozenset(_files(directory)),
    )


def differences(reference: Outcome, other: Outcome) -> list[str]:
    """What `other` lost or made up, one line each; empty if it is the same run."""
    found = []
    if other.state != "finished":
        found.append(f"status.json says {other.state}")
    if not reference.weights or other.weights != reference.weights:
        found.append(f"the final weights differ: {other.weights} instead of {reference.weights}")
    if other.seed_log != reference.seed_log:
        found.append("seedlog.bin differs")
    if missing := reference.files - other.files:
        found.append(f"files are missing: {', '.join(sorted(missing))}")
    if surplus := other.files - reference.files:
        found.append(f"files are left over: {', '.join(sorted(surplus))}")
    lines = enumerate(zip_longest(reference.metrics, other.metrics), 1)
    for number, (expected, line) in ((number, pair) for number, pair in lines if pair[0] != pair[1]):
        found.append(f"metrics.jsonl:{number}: {line or 'nothing'} instead of {expected or 'nothing'}")
        break
    return found


def read_status(directory: Path) -> dict[str, Any] | None:
    """status.json; None where there is none."""
    try:
        status: dict[str, Any] = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return status


def tree_digest(directory: Path) -> str:
    """A hash of every name and every byte below a folder."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path}\n".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _lines(metrics: Path) -> Iterator[str]:
    for line in metrics.read_text(encoding="utf-8").splitlines():
        values = {name: value for name, value in json.loads(line).items() if name not in _OF_THE_CLOCK}
        yield json.dumps(values)


def _files(directory: Path) -> Iterator[str]:
    yield from (path.name for path in directory.iterdir() if path.name not in _OF_THE_PAST)
    yield from (f"model/{path.name}" for path in (directory / "model").glob("*"))
    checkpoints = sorted((directory / "checkpoints").iterdir())
    newest = checkpoints[-1]
    yield from (str(path.relative_to(directory)) for path in newest.rglob("*"))
    yield from (str(path.relative_to(directory)) for path in checkpoints if path.name.startswith("."))
