import collections
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vamo_ft.core.errors import DataError
from vamo_ft.training.checkpoint import discard_later, newest_checkpoint, open_checkpoint, save_checkpoint


def save_model(folder: Path) -> None:
    (folder / "nested").mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(3000))
    (folder / "nested" / "config.json").write_text("{}")


def save(root: Path, step: int, *, keep: int = 9, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "owners": {"run": {"step": step, "values": torch.arange(4.0) + step}, "estimator": {"none": None}},
        "save_model": save_model,
        "facts": {"fingerprint": "abc", "best": math.inf},
    }
    return save_checkpoint(root, step=step, keep=keep, **{**arguments, **changes})


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def same(a: Any, b: Any) -> bool:
    """Equal in type and in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        as_bytes = [x.contiguous().flatten().view(torch.uint8) if x.numel() else x for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "numbers": [
            0,
            -(2**80),
            0.1,
            1e-320,
            -0.0,
            math.pi,
            math.inf,
            -math.inf,
            math.nan,
            True,
            False,
            None,
            "é\n\ud800",
        ],
        "dtypes": [
            torch.tensor([1, -(2**62)]),
            torch.tensor([0.1, math.nan, math.inf], dtype=torch.float64),
            torch.tensor([True, False]),
            torch.randn(3, 5).bfloat16(),
            torch.randn(2).half(),
            torch.tensor([1, 255], dtype=torch.uint8),
        ],
        "empty": torch.zeros(0, 4),
        "another empty": torch.zeros(0),
        "scalar": torch.tensor(3.5),
        "transposed": torch.randn(3, 4).T,
        "shared": {"all": shared, "part": shared[2:4], "again": shared},
        "parameter": torch.nn.Parameter(torch.ones(2)).detach(),
        "awkward keys": {
            "a/b": torch.tensor(1),
            "a": {"b": torch.tensor(2)},
            "a~1b": torch.tensor(3),
            "": torch.tensor(4),
        },
        "empty dict": {},
        "empty list": [],
    }
    path = save(tmp_path, 7, owners={"owner": state, "bare": {}})
    opened = open_checkpoint(path)
    assert same(opened.load("owner"), state)
    assert opened.load("bare") == {}
    for file in path.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: 2}, {"$tensor": "x"}, {1, 2}, Path("x"), collections.OrderedDict(a=1), 1j],
    ids=lambda value: type(value).__name__,
)
def test_other_types_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state/a/1: \w+ cannot be saved"):
        save(tmp_path, 1, owners={"owner": {"a": [0, value]}})
    assert visible(tmp_path) == []


def test_facts_hold_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state/facts/x: Tensor cannot be saved"):
        save(tmp_path, 1, facts={"x": torch.ones(1)})
    assert visible(tmp_path) == []


def test_checkpoint_as_a_whole(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert newest_checkpoint(root) is None
    path = save(root, 200)
    found = newest_checkpoint(root)
    assert found == open_checkpoint(path)
    assert found is not None
    assert (found.path, found.step) == (root / "step-00000200", 200)
    assert found.facts == {"fingerprint": "abc", "best": math.inf}
    assert (found.model_dir / "model.safetensors").stat().st_size == 3000
    manifest = json.loads((path / "MANIFEST.json").read_text())
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {"MANIFEST.json"}
    assert set(manifest["files"]) == files
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(DataError, match="has no state of optimizer"):
        found.load("optimizer")


FILES = [
    "MANIFEST.json",
    "model/model.safetensors",
    "model/nested/config.json",
    "state/run.json",
    "state/run.safetensors",
    "state/estimator.json",
    "state/estimator.safetensors",
]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    aside = path.parents[3] / "aside"
    shutil.move(path, aside)
    path.symlink_to(aside)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, link])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    root = tmp_path / "run" / "checkpoints"
    save(root, 1)
    path = save(root, 2)
    damage(path / name)
    with pytest.raises(DataError, match=f"step-00000002: {name}") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "vamo_ft"):
        found = newest_checkpoint(root)
    assert found is not None
    assert found.step == 1
    assert f"step-00000002: {name}" in caplog.text
    damage(root / "step-00000001" / name) if damage is not link else shutil.rmtree(root / "step-00000001")
    assert newest_checkpoint(root) is None


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["sha256"]
    change(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps({**manifest, "sha256": digest}))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "model/../../outside"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": ""}}))
    with pytest.raises(DataError, match="points outside of the checkpoint"):
        open_checkpoint(path)


def test_linked_folders_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shutil.move(path / "model", tmp_path / "aside")
    (path / "model").symlink_to(tmp_path / "aside")
    with pytest.raises(DataError, match="model is a symbolic link"):
        open_checkpoint(path)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a symbolic link"):
        open_checkpoint(path)


def test_manifest_of_another_version_or_step(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: None)
    open_checkpoint(path)
    rewrite_manifest(path, lambda manifest: manifest.update(format=2))
    with pytest.raises(DataError, match="has format 2, this version reads 1"):
        open_checkpoint(path)
    rewrite_manifest(path, lambda manifest: manifest.update(format=1, step=3))
    with pytest.raises(DataError, match="belongs to step 3"):
        open_checkpoint(path)


def test_old_and_abandoned_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert visible(tmp_path) == ["step-00000002", "step-00000003"]
    save(tmp_path, 100_000_000, keep=2)
    assert visible(tmp_path) == ["step-00000003", "step-100000000"]
    save(tmp_path, 7, keep=2)
    assert visible(tmp_path) == ["step-00000003", "step-00000007"]
    save(tmp_path, 8, keep=1)
    assert visible(tmp_path) == ["step-00000008"]


def test_what_a_kill_left_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    shutil.copytree(save(tmp_path, 4), tmp_path / ".tmp-step-00000001")
    (tmp_path / ".tmp-step-00000006.77" / "model").mkdir(parents=True)
    discard_later(open_checkpoint(path))
    assert visible(tmp_path) == ["step-00000002"]


def test_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1, facts={"version": 1})
    save(tmp_path, 1, keep=1, facts={"version": 2})
    assert visible(tmp_path) == ["step-00000001"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.facts == {"version": 2}


class Killed(BaseException):
    """Stands for a process that ends at once."""


def test_kill_at_any_system_call_leaves_an_intact_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a save of the same step and of the next before each rename, fsync and removal; nothing is cleaned up."""
    remove_tree = shutil.rmtree
    for step in (5, 6):
        for deadly in range(1000):
            root = tmp_path / f"{step}-{deadly}"
            save(root, 5, keep=1, facts={"version": 1})
            calls = 0

            def count(call: Callable[..., Any], deadly: int = deadly) -> Callable[..., Any]:
                def counted(*arguments: Any, **keys: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls > deadly:
                        if call is remove_tree and arguments[0].exists():
                            next(file for file in arguments[0].rglob("*") if file.is_file()).unlink()  # half removed
                        raise Killed
                    return call(*arguments, **keys)

                return counted

            with monkeypatch.context() as patch:
                for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                    patch.setattr(owner, name, count(getattr(owner, name)))
                try:
                    save(root, step, keep=1, facts={"version": 2})
                    finished = True
                except Killed:
                    finished = False
            for path in root.glob("step-*"):
                open_checkpoint(path)
            found = newest_checkpoint(root)
            assert found is not None, deadly
            assert found.facts["version"] in ((2,) if finished else (1, 2))
            save(root, 7, keep=1)
            assert visible(root) == ["step-00000007"]
            shutil.rmtree(root)
            if finished:
                break
        assert finished
        assert deadly > 15


def test_failure_within_the_save_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise Killed

    with pytest.raises(Killed):
        save(tmp_path, 2, save_model=fail)
    assert visible(tmp_path) == ["step-00000001"]


def test_full_disk_while_writing(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(
        DataError, match=r"step-00000002: could not be saved: .*No space left on device; the last"
    ) as caught:
        save(tmp_path, 2, save_model=fail)
    assert str(caught.value).endswith("stays: " + str(tmp_path / "step-00000001"))
    assert visible(tmp_path) == ["step-00000001"]


def test_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"run": {"values": torch.zeros(1_000_000)}}
    save(tmp_path, 1, owners=owners)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1_000_000))
    message = (
        r"needs 0\.004 GB and 0\.001 GB are free, 0\.003 GB are missing; the last checkpoint stays: .*step-00000001$"
    )
    with pytest.raises(DataError, match=message):
        save(tmp_path, 2, owners=owners, save_model=lambda folder: pytest.fail("nothing may be written"))
    assert visible(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4_000_000 + 3_001))
    with pytest.raises(DataError, match="are missing"):
        save(tmp_path, 2, owners=owners)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4_000_000 + 3_002))
    save(tmp_path, 2, owners=owners)
