"""The seed log: a few bytes a step from which a run along directions is rebuilt without its checkpoints.

    magic | uint32 size of the header | header, JSON | uint32 CRC-32 of all that
    record, one a step:  uint8 kind | uint32 step | float64 learning rate | uint16 m
                         | m float64 coefficients, as applied | keys | uint32 CRC-32
    seal, at the end:    as a record, with the SHA-256 of the final parameters in the place of coefficients and keys

Little-endian, nothing is padded. Keys are left out where they are the step's own, (seed, DIRECTION, step, 0 to m - 1);
else each is uint8 domain | uint32 step | uint32 probe. The bytes depend on the run alone, not on when they are written,
so that the log of a continued run is that of the uninterrupted one.

Source of the idea: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333,
section 2.1.
"""

import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.protocols import StateDict
from vamo_ft.core.types import ProjectedGradient, ProjectedUpdate
from vamo_ft.training.callbacks import Callback, Due
from vamo_ft.training.state import RunState, StepRecord

__all__ = ["SeedLog", "SeedLogger", "read_seed_log"]

_log = logging.getLogger("vamo_ft")

_MAGIC = b"vamo-ft seed log 1\n"
_SIZE = struct.Struct("<I")
_PREFIX = struct.Struct("<BIdH")
_KEY = struct.Struct("<BII")
_OWN_KEYS, _OTHER_KEYS, _SEAL = 0, 1, 2
_DIGEST = 32  # bytes
_TOGETHER = 1000  # updates kept on the device before they are written, where no metrics line is due earlier


class SeedLogger(Callback):
    """Writes the log of a run.

    Updates stay on the device until a line of metrics is due, which waits for the device anyway, or a checkpoint.
    Where the disk has no room they wait for the next occasion; a checkpoint is not saved without them.
    Belongs behind the callback that saves: a checkpoint of the last step holds the length without the seal.

    Args:
        seed: the run's, of all keys.
        applied: the update made last.
        digest: of the parameters, as 64 hexadecimal digits; asked for once, after the last step.
        due: whether a line of metrics is due.
        ends_early: whether the run ends with a step before its last one.
    """

    def __init__(
        self,
        path: Path,
        *,
        seed: int,
        applied: Callable[[], ProjectedUpdate | None],
        digest: Callable[[], str],
        due: Due,
        num_steps: int,
        ends_early: Due = lambda step: False,
    ) -> None:
        self._path = path
        self._seed = seed
        self._applied = applied
        self._digest = digest
        self._due = due
        self._ends: Due = lambda step: step == num_steps or ends_early(step)
        self._pending: list[ProjectedUpdate] = []
        self._writes = False

    def begin(self, header: Mapping[str, Any]) -> None:
        """Starts a new log, in the place of one that is there.

        Args:
            header: JSON values, what the log belongs to; the seed is added.
        """
        text = json.dumps({**header, "seed": self._seed}, sort_keys=True).encode()
        self._path.unlink(missing_ok=True)
        self._writes = True
        self._append(_with_crc(_MAGIC + _SIZE.pack(len(text)) + text))

    def after_step(self, state: RunState, record: StepRecord) -> None:
        """Takes the update down."""
        update = self._applied()
        assert update is not None and update.step == state.step - 1
        self._pending.append(update)
        if self._due(state.step) or len(self._pending) >= _TOGETHER:
            self._write()

    def at_boundary(self, state: RunState) -> None:
        """Seals the log after the last step."""
        if self._ends(state.step):
            seal = _PREFIX.pack(_SEAL, state.step, 0.0, 0) + bytes.fromhex(self._digest())
            self._write(_with_crc(seal), durably=True)

    def state_dict(self) -> StateDict:
        """How much of the file belongs to the run so far, all of it on the disk; None: there is no complete log."""
        self._write(durably=True)
        return {"length": self._path.stat().st_size if self._writes else None}

    def load_state_dict(self, state: StateDict) -> None:
        """Cuts the file back to `state_dict`'s length; where it is shorter nothing more is written, with a warning."""
        self._pending.clear()
        length, found = state["length"], self._path.stat().st_size if self._path.is_file() else 0
        self._writes = length is not None and length <= found
        if length is not None and not self._writes:
            _log.warning(
                "%s: %d bytes shorter than the checkpoint says; it ends there, and the run goes on without a seed log",
                self._path,
                length - found,
            )
        if self._writes and length < found:
            with self._path.open("r+b") as file:
                file.truncate(length)
                os.fsync(file.fileno())

    def _write(self, end: bytes = b"", *, durably: bool = False) -> None:
        if self._writes:
            try:
                self._append(b"".join(_encoded(self._pending, seed=self._seed)) + end, durably=durably)
            except SaveError as error:
                if durably:
                    raise
                _log.warning("%s; its lines wait until there is room", error)
                return
        self._pending.clear()

    def _append(self, data: bytes, *, durably: bool = False) -> None:
        length = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with self._path.open("ab", buffering=0) as file:
                try:
                    rest = data
                    while rest:
                        rest = rest[file.write(rest) :]
                    if durably:
                        os.fsync(file.fileno())
                except OSError:
                    file.truncate(length)  # what follows must not follow a part of a record
                    raise
        except OSError as error:
            raise SaveError(
                f"{self._path}: could not be written: {error.strerror}; the last checkpoint stays: make room, and run "
                "again to go on from it"
            ) from error


@dataclass(frozen=True, slots=True)
class SeedLog:
    """What of a log can be read.

    Attributes:
        header: what it belongs to.
        updates: those of steps 0, 1, 2 ... up to the first damage, coefficients in float64 on the CPU.
        final_digest: hash of the final parameters; None where the log does not reach the end of its run.
    """

    header: Mapping[str, Any]
    updates: tuple[ProjectedUpdate, ...]
    final_digest: str | None


def read_seed_log(path: Path) -> SeedLog:
    """Reads as many steps as are intact.

    Raises:
        DataError: there is no log, or its header is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; zeroth-order runs with plain sgd write one"
        ) from None
    start = len(_MAGIC) + _SIZE.size
    if not content.startswith(_MAGIC) or len(content) < start:
        raise DataError(f"{path}: is not a seed log that this version reads")
    (size,) = _SIZE.unpack_from(content, len(_MAGIC))
    if (head := _checked(content, 0, start + size)) is None:
        raise DataError(f"{path}: the header is damaged; not one step can be read")
    header: dict[str, Any] = json.loads(head[start:])
    updates: list[ProjectedUpdate] = []
    final, position = None, start + size + _SIZE.size
    while (found := _record_at(content, position)) is not None:
        kind, step, learning_rate, count, body, position = found
        if step != len(updates):
            break
        if kind == _SEAL:
            final = body.hex() if position == len(content) else None
            break
        gradient = _decoded(body, kind=kind, step=step, count=count, seed=header["seed"])
        updates.append(ProjectedUpdate(step, learning_rate, gradient))
    return SeedLog(header, tuple(updates), final)


def _encoded(updates: Sequence[ProjectedUpdate], *, seed: int) -> Iterator[bytes]:
    """A record for each update; the coefficients leave the device together."""
    if not updates:
        return
    coefficients = torch.cat([update.gradient.coefficients for update in updates])
    assert coefficients.dtype == torch.float64, "a replay starts from what the update started from"
    values = coefficients.tolist()
    ends = list(accumulate((len(update.gradient.keys) for update in updates), initial=0))
    for update, (start, stop) in zip(updates, pairwise(ends), strict=True):
        keys = update.gradient.keys
        assert all(key.seed == seed for key in keys)
        own = keys == _own_keys(seed, update.step, len(keys))
        prefix = _PREFIX.pack(_OWN_KEYS if own else _OTHER_KEYS, update.step, update.learning_rate, len(keys))
        body = struct.pack(f"<{len(keys)}d", *values[start:stop])
        named = b"" if own else b"".join(_KEY.pack(key.domain, key.step, key.probe) for key in keys)
        yield _with_crc(prefix + body + named)


def _decoded(body: bytes, *, kind: int, step: int, count: int, seed: int) -> ProjectedGradient:
    coefficients = torch.tensor(struct.unpack_from(f"<{count}d", body), dtype=torch.float64)
    if kind == _OWN_KEYS:
        return ProjectedGradient(coefficients, _own_keys(seed, step, count))
    named = _KEY.iter_unpack(body[8 * count :])
    return ProjectedGradient(
        coefficients, tuple(HashKey(seed, Domain(domain), origin, probe) for domain, origin, probe in named)
    )


def _record_at(content: bytes, position: int) -> tuple[int, int, float, int, bytes, int] | None:
    """Kind, step, learning rate, m, body and the place of the next record; None where no intact one begins."""
    if len(content) < position + _PREFIX.size:
        return None
    kind, step, learning_rate, count = _PREFIX.unpack_from(content, position)
    sizes = {_OWN_KEYS: 8 * count, _OTHER_KEYS: (8 + _KEY.size) * count, _SEAL: _DIGEST}
    if kind not in sizes:
        return None
    stop = position + _PREFIX.size + sizes[kind]
    if (record := _checked(content, position, stop)) is None:
        return None
    return kind, step, learning_rate, count, record[_PREFIX.size :], stop + _SIZE.size


def _own_keys(seed: int, step: int, count: int) -> tuple[HashKey, ...]:
    return tuple(HashKey(seed, Domain.DIRECTION, step, probe) for probe in range(count))


def _with_crc(data: bytes) -> bytes:
    return data + _SIZE.pack(zlib.crc32(data))


def _checked(content: bytes, start: int, stop: int) -> bytes | None:
    """The bytes from `start` to `stop`, if the checksum behind them says that they are intact."""
    part = content[start:stop]
    whole = len(content) >= stop + _SIZE.size
    return part if whole and _SIZE.unpack_from(content, stop)[0] == zlib.crc32(part) else None
