"""Who holds a run directory, told in a way that survives crashes, reboots, and containers that look alike.

A file lock ends with its process, but not every file system that machines share knows locks of another machine, and a
container may have the process number and the host name of the one before it. The lease therefore names its holder by
host, boot, process number and the time at which that process started, and its file's time is renewed as long as the
holder lives. That time is read from the file system and compared with that of a file written just now, so that it does
not matter if the clocks of two machines differ.
"""

import errno
import json
import os
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

__all__ = ["HEARTBEAT_SECONDS", "STALE_SECONDS", "Holder", "Lease", "living_holder"]

HEARTBEAT_SECONDS = 30.0
"""Between two signs of life."""

STALE_SECONDS = 180.0
"""Without a sign of life after which a holder on another host is taken for dead."""


@dataclass(frozen=True, slots=True)
class Holder:
    """One process.

    Attributes:
        host: its host's name.
        boot_id: changes with every start of the host; None where the system does not tell.
        pid: process number.
        started: when it started, in clock ticks since the boot; None where the system does not tell.
    """

    host: str
    boot_id: str | None
    pid: int
    started: int | None

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(socket.gethostname(), _boot_id(), os.getpid(), _started(os.getpid()))

    def is_alive(self) -> bool:
        """Whether this host, since this boot, has this very process."""
        here = Holder.here()
        if (self.host, self.boot_id) != (here.host, here.boot_id):
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # it is another user's
            pass
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """Names this process as the holder of a folder, with a sign of life every `HEARTBEAT_SECONDS`, until `release`.

    Args:
        path: the lease's file; one that is there is replaced in one step.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.write(self._descriptor, (json.dumps(asdict(Holder.here())) + "\n").encode())
            os.fsync(self._descriptor)
            temporary.replace(path)
        except OSError:
            os.close(self._descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    @property
    def is_held(self) -> bool:
        """False once another process has taken it: this one showed no sign of life for `STALE_SECONDS`.

        So it is after a stop of the process or of its whole machine, which this process cannot notice by itself. A file
        that is not there any more was taken, too, and released: on a network file system the open one is stale then.
        A file system that does not answer tells nothing.
        """
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False
        except OSError as error:
            return error.errno != errno.ESTALE

    def release(self) -> None:
        """Removes the file, unless it is another process's by now."""
        self._released.set()
        self._heart.join()
        with suppress(OSError):
            if self.is_held:
                self._path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # The open file and not its name: a lease that was taken over is no longer kept alive from here. A full
            # disk does not matter, and a failure is only a missed beat.
            with suppress(OSError):
                os.utime(self._descriptor)


def living_holder(path: Path, *, now: float) -> tuple[Holder | None, str | None]:
    """Who holds the lease at `path`, and what there is to say about it.

    On this host it is a process that matches in all four; on another, one whose last sign of life is less than
    `STALE_SECONDS` away. A time ahead of `now` by more than that comes from before a clock was set back: whoever lives
    would have renewed it since.

    Args:
        now: the file system's time, in seconds.

    Returns:
        The holder and its last sign of life, if it lives. None and whom the lease is taken over from, if it is dead.
        None twice where there is no lease.
    """
    try:
        age = now - path.stat().st_mtime
        holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
        same_host = holder.host == Holder.here().host
        alive = holder.is_alive() if same_host else abs(age) < STALE_SECONDS
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError) as error:
        return None, f"a lease that cannot be read ({error})"
    if not alive:
        reason = "it is no longer there" if same_host else f"no sign of life for {abs(age):.0f} s"
        return None, f"{holder} ({reason})"
    if same_host:
        return holder, "it is running"
    wait = max(0.0, STALE_SECONDS - age)
    return holder, f"sign of life {max(0.0, age):.0f} s ago; if it has ended, try again in {wait:.0f} s"


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; the command in field 2 may hold spaces and brackets. None for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
