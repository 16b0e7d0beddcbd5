"""What accidents do to files between two processes of a run."""

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vamo_ft.training.lease import Holder

__all__ = ["Damage", "all_but_a_copy_damaged", "damage_a_file", "dead_leases", "foreign_lease"]


@dataclass(frozen=True)
class Damage:
    """One file that is no longer what it was.

    Attributes:
        kind: cut, flipped or deleted.
        part: model, state or manifest.
        file: its path in the checkpoint.
    """

    kind: str
    part: str
    file: str


def damage_a_file(checkpoint: Path, chance: random.Random) -> Damage:
    """Cuts a random file of a checkpoint, flips one of its bits, or deletes it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size > 2)
    part = chance.choice(["model", "state", "MANIFEST.json"])
    file = chance.choice([path for path in files if path.relative_to(checkpoint).parts[0] == part])
    content = bytearray(file.read_bytes())
    kind = chance.choice(["cut", "flipped", "deleted"])
    match kind:
        case "cut":
            file.write_bytes(
                content[: chance.randrange(len(content) - 1)]
            )  # a manifest without its last newline is one
        case "flipped":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        case _:
            file.unlink()
    return Damage(kind, part, str(file.relative_to(checkpoint)))


@contextmanager
def all_but_a_copy_damaged(checkpoints: Sequence[Path], chance: random.Random, *, aside: Path) -> Iterator[None]:
    """Damages every checkpoint; the newest is as before after the block."""
    newest = checkpoints[0]
    shutil.copytree(newest, aside)
    for checkpoint in checkpoints:
        damage_a_file(checkpoint, chance)
    yield
    shutil.rmtree(newest)
    aside.rename(newest)


def dead_leases() -> Mapping[str, str]:
    """Name -> the lease of a process that is no more."""
    here = Holder.here()
    boot = here.boot_id
    return {
        "dead process": _lease(here.host, boot, 2**22 + 1, here.started),
        "number used again": _lease(here.host, boot, here.pid, 1),
        "earlier boot": _lease(here.host, "11111111-2222-3333-4444-555555555555", here.pid, here.started),
        "half a file": _lease(here.host, boot, 1, 1)[:20],
    }


def foreign_lease() -> str:
    """Of a process on another machine; it lives as long as its file is young."""
    return _lease("another-machine", None, 1, None)


def _lease(host: str, boot_id: str | None, pid: int, started: int | None) -> str:
    return json.dumps({"host": host, "boot_id": boot_id, "pid": pid, "started": started})
