"""Saves onto disks without room: nothing of the past is lost, and the message says how much is missing."""

import errno
import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.full_disk import fill, largest_file, pretend_free, small_disk
from tests.tiny import byte_tokenizer, tiny_llama
from vamo_ft.core.errors import SaveError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.types import ProjectedGradient, ProjectedUpdate
from vamo_ft.models.export import save_model, saved_bytes
from vamo_ft.training.callbacks import Checkpointer
from vamo_ft.training.checkpoint import newest_checkpoint, save_checkpoint
from vamo_ft.training.disk import disk_error, full_disk_explained
from vamo_ft.training.seedlog import SeedLogger, read_seed_log
from vamo_ft.training.sinks import MetricsWriter
from vamo_ft.training.space import check_run_space, tensor_bytes
from vamo_ft.training.state import RunState, StepRecord


def write_weights(folder: Path) -> None:
    save_file({"x": torch.zeros(100_000)}, folder / "model.safetensors")  # 0.4 MB


def save(root: Path, step: int, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"owners": {"run": {"step": step}}, "save_model": write_weights, "facts": {}, "keep": 2}
    return save_checkpoint(root, step=step, **{**arguments, **changes})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def weights_in_python(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(400_000))


def whole_model(folder: Path) -> None:
    save_model(tiny_llama(), byte_tokenizer(), folder)


@pytest.mark.parametrize("save_weights", [write_weights, weights_in_python, whole_model])
def test_a_disk_that_fills_within_a_save(tmp_path: Path, save_weights: Callable[[Path], None]) -> None:
    with small_disk(tmp_path / "disk", size=3_000_000) as disk:
        root = disk / "checkpoints"
        good = save(root, 1)
        ballast = fill(disk, leave=420_000)

        def others_write_too(folder: Path) -> None:
            fill(folder, leave=100_000)
            save_weights(folder)

        with pytest.raises(SaveError, match="step-00000002: could not be saved: it needs ") as caught:
            save(root, 2, save_model=others_write_too)
        assert "No space left on device" in str(caught.value)
        assert "are free" in str(caught.value)
        assert str(caught.value).endswith(f"the last checkpoint stays: {good}")
        assert names(root) == ["step-00000001"]
        assert newest_checkpoint(root) is not None
        with pytest.raises(
            SaveError, match=r"a checkpoint needs 0\.001 GB and 0\.000 GB are free, 0\.001 GB are missing"
        ):
            save(root, 2, model_bytes=1_000_000)
        ballast.unlink()
        save(root, 3)
        assert names(root) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("save_weights", [write_weights, weights_in_python, whole_model])
def test_a_limit_on_the_size_of_files(tmp_path: Path, save_weights: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    with largest_file(20_000), pytest.raises(SaveError, match="a quota or a limit on the size of files") as caught:
        save(tmp_path, 2, save_model=save_weights)
    assert "File too large" in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]


def test_a_tokenizer_that_does_not_fit_is_told_by_its_library_in_text(tmp_path: Path) -> None:
    def tokenizer(folder: Path) -> None:
        byte_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))

    with largest_file(2_000), pytest.raises(SaveError, match="File too large"):
        save(tmp_path, 1, save_model=tokenizer)
    assert names(tmp_path) == []


def test_errors_of_libraries_are_understood() -> None:
    error = disk_error(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert error is not None
    assert (error.errno, error.strerror) == (errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert disk_error(RuntimeError("os error")) is None
    with pytest.raises(RuntimeError, match="else"), full_disk_explained(Path()):
        raise RuntimeError("something else")
    with pytest.raises(PermissionError), full_disk_explained(Path()):
        raise PermissionError(errno.EACCES, "no")
    message = r"no room to write \(Disk quota exceeded; .* are free\); the checkpoints stay"
    with pytest.raises(SaveError, match=message), full_disk_explained(Path()):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_the_model_and_earlier_checkpoints_tell_what_a_save_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_free(monkeypatch, 299_999)
    with pytest.raises(SaveError, match=r"are missing$"):
        save(tmp_path, 1, model_bytes=300_000)
    assert names(tmp_path) == []
    pretend_free(monkeypatch, 300_000)
    save(tmp_path, 1, model_bytes=300_000)
    with pytest.raises(SaveError, match="the last checkpoint stays"):  # the one that is there took more
        save(tmp_path, 2, model_bytes=300_000)


@pytest.mark.parametrize(
    ("present", "num_saves", "needed"),
    [
        (0, 1, 1 * 150 + 100),  # and the final model
        (0, 9, 3 * 150 + 100),  # two that are kept, and the new one
        (0, 2, 2 * 150 + 100),
        (1, 9, 2 * 150 + 100),
        (2, 9, 1 * 150 + 100),
        (5, 9, 1 * 150 + 100),
        (2, 0, 100),
    ],
)
def test_a_run_has_room_for_one_more_than_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: int, num_saves: int, needed: int
) -> None:
    for step in range(present):
        (tmp_path / f"step-{step:08d}").mkdir()
    keys: dict[str, int] = {"state_bytes": 50, "model_bytes": 100, "num_saves": num_saves, "keep": 2}
    pretend_free(monkeypatch, needed - 1)
    with pytest.raises(SaveError, match=r"0\.000 GB missing; make room, lower checkpoint\.keep"):
        check_run_space(tmp_path / "not" / "made" if present == 0 else tmp_path, **keys)
    pretend_free(monkeypatch, needed)
    check_run_space(tmp_path, **keys)


def test_a_run_that_goes_on_knows_the_size_of_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "file").write_bytes(bytes(1000))
    pretend_free(monkeypatch, 1099)
    with pytest.raises(SaveError):
        check_run_space(tmp_path, state_bytes=0, model_bytes=100, num_saves=5, keep=1)
    pretend_free(monkeypatch, 1100)
    check_run_space(tmp_path, state_bytes=0, model_bytes=100, num_saves=5, keep=1)


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    x = torch.zeros(10)
    assert tensor_bytes({"a": x, "b": [x, {"c": x.bfloat16()}], "d": None, "e": 3, "f": "text"}) == 40 + 40 + 20
    for tied in (False, True):
        model = tiny_llama(tied=tied)
        save_model(model, byte_tokenizer(), tmp_path / str(tied))
        header = 6_000
        written = (tmp_path / str(tied) / "model.safetensors").stat().st_size
        assert written - header < saved_bytes(model) <= written


def test_a_failed_save_stops_or_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    saved: list[int] = []

    def save(state: RunState) -> None:
        if state.step == 2:
            raise SaveError("no room")
        saved.append(state.step)

    def checkpointer(*, tolerant: bool) -> Checkpointer:
        return Checkpointer(save, due=lambda step: True, num_steps=9, saved=None, tolerant=tolerant)

    with pytest.raises(SaveError):
        checkpointer(tolerant=False).at_boundary(RunState(step=2))
    callback = checkpointer(tolerant=True)
    with caplog.at_level(logging.WARNING, "vamo_ft"):
        for step in (1, 2, 3):
            callback.at_boundary(RunState(step=step))
    assert saved == [1, 3]
    assert "no room; the run continues" in caplog.text
    with pytest.raises(SaveError):  # exit code 75 promises a checkpoint
        callback.on_stop(RunState(step=2, seconds=1.0))


def test_metrics_wait_for_room_in_whole_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {"step": 1, "text": "x" * 50}
    with caplog.at_level(logging.WARNING, "vamo_ft"), MetricsWriter(path) as writer:
        writer.write(line)
        size = writer.length
        with largest_file(size + size // 2):  # room for a half
            writer.write({**line, "step": 2})
            assert writer.length == size
            writer.write({**line, "step": 3})
            writer.flush()
            assert path.read_bytes().count(b"\n") == 1
        assert caplog.text.count("lines wait until there is room") == 1
        writer.write({**line, "step": 4})
        assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3, 4]
        length = writer.length
    kept: list[str] = []

    def write_two() -> None:
        with MetricsWriter(path) as writer:
            writer.write_lines(["belongs to what is cut off\n"])
            writer.truncate_to(length)
            writer.write({**line, "step": 5})
            writer.write({**line, "step": 6})
            kept.extend(writer.waiting)

    def fail_otherwise() -> None:
        with MetricsWriter(path) as writer:
            writer.write(line)
            raise ZeroDivisionError

    with largest_file(length), pytest.raises(SaveError, match="no room for its last 2 lines"):
        write_two()
    with largest_file(length), pytest.raises(ZeroDivisionError):
        fail_otherwise()
    assert path.read_bytes().count(b"\n") == 4
    with MetricsWriter(path) as writer:
        writer.write_lines(kept)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_seed_log_waits_for_room_in_whole_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def written(path: Path, *, limit: int | None) -> bytes:
        updates = (
            ProjectedUpdate(step, 0.1, ProjectedGradient(torch.ones(9, dtype=torch.float64) * step, keys(step)))
            for step in range(4)
        )
        current: list[ProjectedUpdate] = []
        logger = SeedLogger(
            path, seed=3, applied=lambda: current[-1], digest=lambda: "00" * 32, due=lambda step: True, num_steps=4
        )
        logger.begin({})
        for step, update in enumerate(updates, start=1):
            current.append(update)
            with largest_file(path.stat().st_size + 20) if limit == step else nullcontext():
                logger.after_step(RunState(step=step), StepRecord(0.0, 0.1, {}, {}))
                if limit == step:
                    with pytest.raises(SaveError, match="could not be written: File too large"):
                        logger.state_dict()
        logger.at_boundary(RunState(step=4))
        return path.read_bytes()

    def keys(step: int) -> tuple[HashKey, ...]:
        return tuple(HashKey(3, Domain.DIRECTION, step, probe) for probe in range(9))

    whole = written(tmp_path / "whole", limit=None)
    with caplog.at_level(logging.WARNING, "vamo_ft"):
        assert written(tmp_path / "full", limit=2) == whole
    assert "wait until there is room" in caplog.text
    assert len(read_seed_log(tmp_path / "full").updates) == 4
