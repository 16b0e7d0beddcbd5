"""Signs of life, so that a process which is cut off without a word is not waited for.

The connections of a machine that lost its power or its network stay open. A thread of every process therefore counts in
the launcher's store, and whoever waits for the others asks whether they still do. A process that is busy, in a long
save or a compilation, goes on counting.
"""

import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

from vamo_ft.core.errors import ProcessLostError

__all__ = ["OF_A_CONNECTION", "Heartbeat"]

OF_A_CONNECTION = "connection"
"""Name of threads that may wait in a library, for what never comes, when the process ends."""

_BETWEEN = timedelta(seconds=30)
_ROUNDS = 20  # without a sign; one long call that keeps a process's threads waiting is no reason to give it up


class Heartbeat:
    """This process's signs of life in the store, and those it sees there: of all in the main one, of that in others.

    Silence is counted in rounds and not in time, in which this process, too, may have been stopped.

    Args:
        store: in which the processes met.
        count: of processes.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self.between = _BETWEEN
        """Who waits for the others asks `check` that often."""
        self._store = store.clone()  # a connection of its own, on which an answer may not come
        self._rank = rank
        self._heard = dict.fromkeys([0] if rank else range(1, count), 0)
        self._silent = dict.fromkeys(self._heard, 0)  # rounds without a sign of life
        self._rounds = 0
        self._rounds_asked, self._unanswered = 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=OF_A_CONNECTION, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Looks whether it is of use to wait on; asked by who waits, `between` after it began or asked before.

        Raises:
            ProcessLostError: another process, or the store, is silent.
        """
        self._unanswered = 0 if self._rounds != self._rounds_asked else self._unanswered + 1
        self._rounds_asked = self._rounds
        minutes = _ROUNDS * self.between.total_seconds() / 60
        cut_off = f"for {minutes:.3g} minutes: its machine lost its power or its network, or it was stopped"
        if silent := [rank for rank, rounds in self._silent.items() if rounds >= _ROUNDS]:
            raise ProcessLostError(f"process {silent[0]} of the run gave no sign of life {cut_off}")
        if self._unanswered >= _ROUNDS:
            raise ProcessLostError(f"the launcher, in whose store the processes met, gave no answer {cut_off}")

    def stop(self) -> None:
        """Gives no more of them; does not wait for an answer that may not come."""
        self._ended.set()
        self._thread.join(timeout=1.0)

    def _beat(self) -> None:
        while not self._ended.wait(self.between.total_seconds()):
            with suppress(RuntimeError):  # a store that is gone is silent, too
                self._store.add(_key(self._rank), 1)
                for rank, heard in self._heard.items():
                    self._heard[rank] = self._store.add(_key(rank), 0)
                    self._silent[rank] = self._silent[rank] + 1 if self._heard[rank] == heard else 0
                self._rounds += 1


def _key(rank: int) -> str:
    return f"vamo_ft/alive/{rank}"
