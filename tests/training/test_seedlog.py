"""The format of the seed log, and what is left of one that is damaged."""

import json
import logging
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vamo_ft.core.errors import DataError, SaveError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.types import ProjectedGradient, ProjectedUpdate
from vamo_ft.training.seedlog import SeedLogger, read_seed_log
from vamo_ft.training.state import RunState, StepRecord

SEED = 2**63 - 5
DIGEST = "ab" * 32
RATES = (1e-3, 1e-3 / 3, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9)
SIZES = (3 + 6 + 8 + 4 + 9, 3 + 6 + 8 + 8 + 18, 3 + 8 + 8, 3 + 6 + 4, 9 + 32)
"""Bytes of the records of `UPDATES`, and of the seal."""


def update(step: int, *coefficients: float, keys: Sequence[tuple[int, int]] | None = None) -> ProjectedUpdate:
    named = [(step, probe) for probe in range(len(coefficients))] if keys is None else keys
    gradient = ProjectedGradient(
        torch.tensor(coefficients, dtype=torch.float32).double(),
        tuple(HashKey(SEED, Domain.DIRECTION, origin, probe) for origin, probe in named),
    )
    return ProjectedUpdate(step, RATES[step], gradient)


UPDATES = [
    update(0, 0.1, keys=[(0, 1)]),
    update(1, -1 / 3, float("inf"), keys=[(1, 0), (0, 1)]),
    update(2, 2**-149, -0.0),
    update(3, 7.0),
]


class Driver:
    """Plays the trainer: tells a logger of steps."""

    def __init__(self, path: Path, *, num_steps: int = len(UPDATES), due_every: int = 1) -> None:
        self.state = RunState()
        self.logger = SeedLogger(
            path,
            seed=SEED,
            applied=lambda: UPDATES[self.state.step - 1],
            digest=lambda: DIGEST,
            due=lambda step: step % due_every == 0,
            num_steps=num_steps,
        )

    def run(self, steps: int) -> "Driver":
        for _ in range(steps):
            self.logger.at_boundary(self.state)
            self.state.step += 1
            self.logger.after_step(self.state, StepRecord(0.0, 0.0, {}, {}))
        self.logger.at_boundary(self.state)
        return self


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "seedlog.bin"


@pytest.fixture
def whole(path: Path) -> bytes:
    driver = Driver(path)
    driver.logger.begin({"base": "x"})
    driver.run(4)
    return path.read_bytes()


def own_gradient(step: int) -> ProjectedGradient:
    return ProjectedGradient(torch.tensor([step + 0.5]).double(), (HashKey(SEED, Domain.DIRECTION, step, 0),))


def same(found: Sequence[ProjectedUpdate], expected: Sequence[ProjectedUpdate]) -> bool:
    def bits(each: ProjectedUpdate) -> tuple[object, ...]:
        return (
            each.step,
            each.learning_rate,
            each.gradient.keys,
            each.gradient.coefficients.view(torch.int64).tolist(),
        )

    return [bits(each) for each in found] == [bits(each) for each in expected]


def test_bytes_are_those_of_the_description(path: Path, whole: bytes) -> None:
    header = json.dumps({"base": "x", "seed": SEED}).encode()
    content = b"vamo-ft seed log 2\n" + struct.pack("<I", len(header)) + header
    content += struct.pack("<I", zlib.crc32(content))
    for record in (
        struct.pack("<BIHdfBII", 1 + 2 + 4, 0, 1, RATES[0], 0.1, 1, 0, 1),
        struct.pack("<BIHdffBIIBII", 1 + 2 + 4, 1, 2, RATES[1], -1 / 3, float("inf"), 1, 1, 0, 1, 0, 1),
        struct.pack("<Bdff", 2, RATES[2], 2**-149, -0.0),
        struct.pack("<BIHf", 1, 3, 1, 7.0),
    ):
        content += record
        content += struct.pack("<H", zlib.crc32(content) & 0xFFFF)
    content += struct.pack("<BI", 8, 4) + bytes.fromhex(DIGEST)
    content += struct.pack("<I", zlib.crc32(content))
    assert whole == content


def test_a_plain_run_takes_seven_bytes_a_step(path: Path) -> None:
    state, sizes = RunState(), []
    logger = SeedLogger(
        path,
        seed=SEED,
        applied=lambda: ProjectedUpdate(state.step - 1, 1e-9, own_gradient(state.step - 1)),
        digest=lambda: DIGEST,
        due=lambda step: step % 10 == 0,
        num_steps=2001,
    )
    logger.begin({})
    for _ in range(2000):
        state.step += 1
        logger.after_step(state, StepRecord(0.0, 0.0, {}, {}))
        sizes.append(path.stat().st_size)
    assert sizes[1999] - sizes[999] == 7000
    assert len(read_seed_log(path).updates) == 2000


@pytest.mark.parametrize("saved_after", [2, 3, 4])
def test_steps_that_made_no_update_are_no_damage(path: Path, saved_after: int) -> None:
    """As after a rollback; also when the run goes on in between."""
    made = [UPDATES[0], update(1, 1.0), update(4, 2.0), update(6, 3.0)]
    current: list[ProjectedUpdate] = []

    def follow(logger: SeedLogger, steps: range) -> None:
        for each in made:
            if each.step + 1 in steps:
                current.append(each)
                logger.after_step(RunState(step=each.step + 1), StepRecord(0.0, 0.0, {}, {}))

    first, second = (
        SeedLogger(
            path, seed=SEED, applied=lambda: current[-1], digest=lambda: DIGEST, due=lambda step: True, num_steps=8
        )
        for _ in range(2)
    )
    first.begin({})
    follow(first, range(1, saved_after + 1))
    second.load_state_dict(first.state_dict())
    follow(second, range(saved_after + 1, 9))
    log = read_seed_log(path)
    assert (log.num_steps, log.final_digest) == (7, None)
    second.at_boundary(RunState(step=8))
    log = read_seed_log(path)
    assert same(log.updates, made)
    assert (log.num_steps, log.final_digest) == (8, DIGEST), "the last step made none"


def test_reading_gives_every_bit_back(path: Path, whole: bytes) -> None:
    log = read_seed_log(path)
    assert log.header == {"base": "x", "seed": SEED}
    assert log.final_digest == DIGEST
    assert same(log.updates, UPDATES)


@pytest.mark.parametrize("due_every", [2, 3, 100])
def test_bytes_do_not_depend_on_when_they_are_written(path: Path, whole: bytes, due_every: int) -> None:
    driver = Driver(path, due_every=due_every)
    driver.logger.begin({"base": "x"})
    driver.run(4)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("saved_after", [0, 1, 3, 4])
@pytest.mark.parametrize("tail", [b"", b"\x00\x01half a record"])
def test_a_resumed_log_is_the_uninterrupted_one(path: Path, whole: bytes, saved_after: int, tail: bytes) -> None:
    first = Driver(path, num_steps=5, due_every=3)
    first.logger.begin({"base": "x"})
    state = first.run(saved_after).logger.state_dict()
    assert path.stat().st_size == state["length"]
    first.run(4 - saved_after)
    path.write_bytes(path.read_bytes() + tail)
    second = Driver(path)
    second.state.step = saved_after
    second.logger.load_state_dict(state)
    second.run(4 - saved_after)
    assert path.read_bytes() == whole


def test_going_on_from_the_last_step_moves_the_seal(path: Path, whole: bytes) -> None:
    driver = Driver(path, num_steps=3)
    driver.logger.begin({"base": "x"})
    state = driver.run(2).logger.state_dict()
    driver.run(1)
    assert read_seed_log(path).final_digest == DIGEST
    longer = Driver(path)
    longer.state.step = 2
    longer.logger.load_state_dict(state)
    longer.run(2)
    assert path.read_bytes() == whole


def test_a_log_that_lost_bytes_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Driver(path, num_steps=9)
    first.logger.begin({})
    state = first.run(2).logger.state_dict()
    short = path.read_bytes()[:-3]
    path.write_bytes(short)
    second = Driver(path)
    second.state.step = 2
    with caplog.at_level(logging.WARNING, "vamo_ft"):
        second.logger.load_state_dict(state)
    assert "3 bytes shorter" in caplog.text
    second.run(2)
    assert second.logger.state_dict() == {"length": None}
    assert path.read_bytes() == short
    third = Driver(path)
    third.logger.load_state_dict({"length": None})
    assert path.read_bytes() == short


def test_a_run_without_a_beginning_writes_nothing(path: Path) -> None:
    assert Driver(path).run(4).logger.state_dict() == {"length": None}
    assert not path.exists()


def test_every_damage_is_seen_and_the_steps_before_it_are_kept(path: Path, whole: bytes) -> None:
    ends = [len(whole) - sum(SIZES[index + 1 :]) for index in range(4)]
    for place in range(len(whole) - sum(SIZES), len(whole)):
        intact = sum(end <= place for end in ends)
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            log = read_seed_log(path)
            assert log.final_digest is None
            assert same(log.updates, UPDATES[:intact])
    path.write_bytes(whole + b"\x00")
    assert read_seed_log(path).final_digest is None


def test_a_lost_record_ends_the_log(path: Path, whole: bytes) -> None:
    start = len(whole) - sum(SIZES[2:])
    path.write_bytes(whole[:start] + whole[start + SIZES[2] :])
    assert same(read_seed_log(path).updates, UPDATES[:2])


def test_a_damaged_header_is_refused(path: Path, whole: bytes) -> None:
    for place in range(len(whole) - sum(SIZES)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"not a seed log that this version reads|the header is damaged"):
            read_seed_log(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a seed log"):
        read_seed_log(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_seed_log(path)


def test_what_cannot_be_written_is_told_in_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(path)
    driver.logger.begin({})

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    driver.run(1)  # waits for room
    with pytest.raises(SaveError, match=r"seedlog.bin: could not be written: No space left on device; .* run again"):
        driver.logger.state_dict()
