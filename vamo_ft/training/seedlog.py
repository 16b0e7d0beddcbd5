"""The seed log: a few bytes a step from which a run along directions is rebuilt without its checkpoints.

    magic | uint32 size of the header | header, JSON | uint32 CRC-32 of all that
    record, one for each update:  uint8 flags | [uint32 step | uint16 m] | [float64 learning rate]
                                  | m float32 coefficients, as applied | [keys] | uint16 check
    seal, at the end:             uint8 flags | uint32 step | SHA-256 of the final parameters | uint32 check

Little-endian, nothing is padded. What stands in brackets is there where a flag says so: step and m where the step is
not the next one or m not that of the record before; the learning rate where it has changed; and keys, each uint8 domain
| uint32 step | uint32 probe, where they are not the step's own, (seed, DIRECTION, step, 0 to m - 1). With one probe and
a constant learning rate that is 7 bytes a step. A check is the CRC-32 of the whole file before it, in a record its
lower half: a file that lost its end, or a bit, is good up to there.

The bytes depend on the run alone, not on when they are written, so that the log of a continued run is that of the
uninterrupted one.

Source of the idea: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333,
section 2.1.
"""

import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.core.hashing import Domain, HashKey, direction_keys
from vamo_ft.core.protocols import StateDict
from vamo_ft.core.types import ProjectedGradient, ProjectedUpdate
from vamo_ft.training.callbacks import Callback, Due
from vamo_ft.training.state import RunState, StepRecord

__all__ = ["SeedLog", "SeedLogger", "read_seed_log"]

_log = logging.getLogger("vamo_ft")

_MAGIC = b"vamo-ft seed log 2\n"
_SIZE = struct.Struct("<I")
_FLAGS = struct.Struct("<B")
_PLACE = struct.Struct("<IH")
_RATE = struct.Struct("<d")
_KEY = struct.Struct("<BII")
_CHECK = struct.Struct("<H")
_SEAL = struct.Struct("<BI32sI")
_HAS_PLACE, _HAS_RATE, _HAS_KEYS, _IS_SEAL = 1, 2, 4, 8
_TOGETHER = 1000  # updates kept on the device before they are written, where no metrics line is due earlier


@dataclass(frozen=True, slots=True)
class _End:
    """What a record leaves out when it is as in the one before, at some place of a log.

    Attributes:
        crc: CRC-32 of the file up to there.
        step: the next one.
        count: m of the record before.
        learning_rate: that of the record before; None at the beginning.
    """

    crc: int
    step: int = 0
    count: int = 0
    learning_rate: float | None = None

    def after(self, data: bytes) -> "_End":
        return replace(self, crc=zlib.crc32(data, self.crc))


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
        self._end: _End | None = None  # of what is in the file; None: nothing is written

    def begin(self, header: Mapping[str, Any]) -> None:
        """Starts a new log, in the place of one that is there.

        Args:
            header: JSON values, what the log belongs to; the seed is added.
        """
        text = json.dumps({**header, "seed": self._seed}, sort_keys=True).encode()
        self._path.unlink(missing_ok=True)
        head = _MAGIC + _SIZE.pack(len(text)) + text
        head += _SIZE.pack(zlib.crc32(head))
        self._append(head)
        self._end = _End(zlib.crc32(head))

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
            self._write(durably=True)
            if self._end is not None:  # the seal is no part of what a longer run goes on from
                self._append(_sealed(self._end, state.step, bytes.fromhex(self._digest())), durably=True)

    def state_dict(self) -> StateDict:
        """How much of the file belongs to the run so far, all of it on the disk; None: there is no complete log."""
        self._write(durably=True)
        return {"length": None} if self._end is None else {"length": self._path.stat().st_size, **asdict(self._end)}

    def load_state_dict(self, state: StateDict) -> None:
        """Cuts the file back to `state_dict`'s length; where it is shorter nothing more is written, with a warning."""
        self._pending.clear()
        length, found = state["length"], self._path.stat().st_size if self._path.is_file() else 0
        self._end = None
        if length is None:
            return
        if length > found:
            _log.warning(
                "%s: %d bytes shorter than the checkpoint says; it ends there, and the run goes on without a seed log",
                self._path,
                length - found,
            )
            return
        self._end = _End(**{name: value for name, value in state.items() if name != "length"})
        if length < found:
            with self._path.open("r+b") as file:
                file.truncate(length)
                os.fsync(file.fileno())

    def _write(self, *, durably: bool = False) -> None:
        if self._end is not None:
            data, end = _encoded(self._pending, self._end, seed=self._seed)
            try:
                self._append(data, durably=durably)
            except SaveError as error:
                if durably:
                    raise
                _log.warning("%s; its lines wait until there is room", error)
                return
            self._end = end
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
        updates: those up to the first damage in their order, coefficients in float64 on the CPU. A step that made no
            update has none.
        num_steps: steps of the run that these are all updates of.
        final_digest: hash of the final parameters; None where the log does not reach the end of its run.
    """

    header: Mapping[str, Any]
    updates: tuple[ProjectedUpdate, ...]
    num_steps: int
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
    position = start + _SIZE.unpack_from(content, len(_MAGIC))[0]
    head, end = content[:position], _End(0).after(content[: position + _SIZE.size])
    if content[position : position + _SIZE.size] != _SIZE.pack(zlib.crc32(head)):
        raise DataError(f"{path}: the header is damaged; not one step can be read")
    header: dict[str, Any] = json.loads(head[start:])
    position += _SIZE.size
    updates: list[ProjectedUpdate] = []
    while (found := _record_at(content, position, end, seed=header["seed"])) is not None:
        update, end, position = found
        updates.append(update)
    if (seal := _seal_at(content, position, end)) is None:
        return SeedLog(header, tuple(updates), end.step, None)
    return SeedLog(header, tuple(updates), seal[0], seal[1].hex())


def _encoded(updates: Sequence[ProjectedUpdate], end: _End, *, seed: int) -> tuple[bytes, _End]:
    """A record for each update, and the end behind them; the coefficients leave the device together."""
    if not updates:
        return b"", end
    coefficients = torch.cat([update.gradient.coefficients for update in updates])
    values = coefficients.float()
    assert torch.equal(values.to(coefficients.dtype), coefficients), "a replay starts from what the update started from"
    numbers = values.tolist()
    ends = list(accumulate((len(update.gradient.keys) for update in updates), initial=0))
    data = b""
    for update, (start, stop) in zip(updates, pairwise(ends), strict=True):
        record, end = _record(update, numbers[start:stop], end, seed=seed)
        data += record
    return data, end


def _record(update: ProjectedUpdate, coefficients: Sequence[float], end: _End, *, seed: int) -> tuple[bytes, _End]:
    keys, step, rate = update.gradient.keys, update.step, update.learning_rate
    assert all(key.seed == seed for key in keys) and step >= end.step
    parts = [
        (_HAS_PLACE, _PLACE.pack(step, len(keys)) if (step, len(keys)) != (end.step, end.count) else b""),
        (_HAS_RATE, _RATE.pack(rate) if rate != end.learning_rate else b""),
        (0, struct.pack(f"<{len(keys)}f", *coefficients)),
        (_HAS_KEYS, b"" if keys == direction_keys(seed, step, len(keys)) else b"".join(map(_packed_key, keys))),
    ]
    flags = sum(flag for flag, part in parts if part)
    data = _FLAGS.pack(flags) + b"".join(part for _, part in parts)
    check = _CHECK.pack(end.after(data).crc & 0xFFFF)
    return data + check, _End(end.after(data + check).crc, step + 1, len(keys), rate)


def _record_at(content: bytes, position: int, end: _End, *, seed: int) -> tuple[ProjectedUpdate, _End, int] | None:
    """The update at `position`, and the end and the place behind it; None where no intact record begins.

    Args:
        end: that of all that stands before.
    """
    start, step, count, rate = position, end.step, end.count, end.learning_rate
    try:
        (flags,) = _FLAGS.unpack_from(content, position)
        position += _FLAGS.size
        if flags & _HAS_PLACE:
            step, count = _PLACE.unpack_from(content, position)
            position += _PLACE.size
        if flags & _HAS_RATE:
            (rate,) = _RATE.unpack_from(content, position)
            position += _RATE.size
        coefficients = struct.unpack_from(f"<{count}f", content, position)
        position += 4 * count
        named = content[position:][: _KEY.size * count] if flags & _HAS_KEYS else b""
        position += len(named)
        (check,) = _CHECK.unpack_from(content, position)
    except struct.error:  # the file ends within the record
        return None
    intact = check == end.after(content[start:position]).crc & 0xFFFF
    if not intact or flags & _IS_SEAL or rate is None or step < end.step:
        return None
    position += _CHECK.size
    keys = tuple(HashKey(seed, Domain(domain), origin, probe) for domain, origin, probe in _KEY.iter_unpack(named))
    gradient = ProjectedGradient(
        torch.tensor(coefficients, dtype=torch.float64), keys if named else direction_keys(seed, step, count)
    )
    behind = _End(end.after(content[start:position]).crc, step + 1, count, rate)
    return ProjectedUpdate(step, rate, gradient), behind, position


def _sealed(end: _End, step: int, digest: bytes) -> bytes:
    unchecked = _SEAL.pack(_IS_SEAL, step, digest, 0)[: -_SIZE.size]
    return _SEAL.pack(_IS_SEAL, step, digest, end.after(unchecked).crc)


def _seal_at(content: bytes, position: int, end: _End) -> tuple[int, bytes] | None:
    """Steps of the run and hash of its parameters, where the last thing in the file is an intact seal."""
    if len(content) != position + _SEAL.size:
        return None
    _, step, digest, _ = _SEAL.unpack_from(content, position)
    return (step, digest) if content[position:] == _sealed(end, step, digest) and step >= end.step else None


def _packed_key(key: HashKey) -> bytes:
    return _KEY.pack(key.domain, key.step, key.probe)
