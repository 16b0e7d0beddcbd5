"""The processes of a run: what they tell each other, and how one of them that fails ends all.

Tensors travel through the group that accelerate made for their device; flags and figures of the host through one for
the CPU, so that no question waits for a device. A process that fails leaves a note in the launcher's store before its
connections close, and the others, which notice that at their next collective call, end for the same reason.

Where one process works and the others wait, they wait on the host, for hours if need be, as long as it shows signs of
life. No process comes much later than the others to what devices exchange.
"""

import gc
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vamo_ft.core.errors import (
    DeviceMemoryError,
    DivergenceError,
    ProcessLostError,
    StopRequested,
    UsageError,
    VamoFtError,
)
from vamo_ft.core.memory import is_allocation_failure
from vamo_ft.training.heartbeat import OF_A_CONNECTION, Heartbeat

__all__ = ["Processes", "lost_processes_explained", "world_size"]

Answer = TypeVar("Answer")

_FAILURE, _DONE, _LEFT = "vamo_ft/failure", "vamo_ft/done", "vamo_ft/left"
_SAVING_SECONDS = 600.0  # that the others give the main process to save a run that was stopped
_ENDING_SECONDS = 10.0  # and to end for another reason
_NOTE_SECONDS = 1.0  # in which a note is found where there is one
_ANSWER_SECONDS = 10.0  # in which a store answers, or will not
_LONGEST_SILENCE = timedelta(hours=12)  # of a living process that tokenizes the data, or saves a checkpoint
_ERRORS = {error.exit_code: error for error in (UsageError, DivergenceError, DeviceMemoryError, StopRequested)}


def world_size() -> int:
    """How many processes a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """This process among the others of the run, once accelerate has connected them."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo", timeout=_LONGEST_SILENCE)
        self._store = dist.distributed_c10d._get_default_store()
        self._store_answers = True
        self._heartbeat: Heartbeat | None = Heartbeat(self._store, self.rank, self.count)

    @property
    def is_main(self) -> bool:
        """Whether this is the first one."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes."""
        for tensor in tensors:
            self._reduce(tensor, dist.ReduceOp.SUM)

    def largest_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each element by the largest over the processes."""
        for tensor in tensors:
            whole = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
            self._reduce(whole, dist.ReduceOp.MAX)
            if whole is not tensor:
                tensor.copy_(whole)

    def from_main_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by the main process's."""
        for tensor in tensors:
            with lost_processes_explained():
                self._finish(dist.broadcast(tensor, src=0, group=self._group(tensor), async_op=True), tensor)

    def agreed(self, value: Any) -> Any:
        """The main process's JSON value."""
        text = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor(len(text))
        self.from_main_([length])
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.from_main_([content])
        return json.loads(bytes(content.tolist()))

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        flags = torch.tensor(int(flag))
        self.largest_([flags])
        return bool(flags)

    def _group(self, tensor: Tensor) -> "dist.ProcessGroup | None":
        return self._host if tensor.device.type == "cpu" else None

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        with lost_processes_explained():
            self._finish(dist.all_reduce(tensor, op=operation, group=self._group(tensor), async_op=True), tensor)

    def _finish(self, work: Any, tensor: Tensor) -> None:
        """Waits for an exchange; of one on the host, as long as the others live."""
        if tensor.device.type != "cpu" or self._heartbeat is None:
            work.wait()
            return
        while not _done_within(work, self._heartbeat.between):
            self._heartbeat.check()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Around all that the processes do: when one fails, the others end for the same reason.

        The main process says why. The others leave the block with its exit code and without a word, unless it is gone,
        or does not come to it in time.

        Raises:
            Exception: the failure, in the main process; in another one where the main one has not told it.
            SystemExit: in another one.
        """
        try:
            with self.reasons_told():
                yield
                self.any(False)  # nobody leaves, and has a launcher end the others, before the main process is done
        except BaseException as error:
            self._tell(error)
            told = self._leave(error, _SAVING_SECONDS if isinstance(error, StopRequested) else _ENDING_SECONDS)
            code = _code_of(error)
            if self.is_main or not told or code is None or isinstance(error, ProcessLostError):
                raise
            raise SystemExit(code) from None
        if self._heartbeat is not None:
            self._heartbeat.stop()
        dist.destroy_process_group()

    @contextmanager
    def reasons_told(self) -> Iterator[None]:
        """Turns the loss of a process in the block into what that process said before it was gone, if it did."""
        try:
            yield
        except ProcessLostError as lost:
            note = self._note()
            raise (lost if note is None else _error_of(note)) from None

    def _asked(self, question: Callable[[Any], Answer], *, within: float = 0.0) -> Answer:
        """The store's answer to a question that takes so many seconds.

        Raises:
            RuntimeError: the store is gone.
            TimeoutError: its machine is, and it may never answer; nor is it asked again.
        """
        answers: list[Answer | RuntimeError] = []

        def ask() -> None:
            try:
                answers.append(question(self._store))
            except RuntimeError as error:
                answers.append(error)

        if self._store_answers:
            asking = threading.Thread(target=ask, name=OF_A_CONNECTION, daemon=True)
            asking.start()
            asking.join(timeout=within + _ANSWER_SECONDS)
        self._store_answers = bool(answers)
        if not answers:
            raise TimeoutError("the store gives no answer")
        if isinstance(answers[0], RuntimeError):
            raise answers[0]
        return answers[0]

    def _tell(self, error: BaseException) -> None:
        """Leaves a note, unless another process was first.

        That a process was lost the main one sees by itself, and has more to say of it.
        """
        if isinstance(error, ProcessLostError) and not self.is_main:
            return
        code, text = _code_of(error), str(error)
        if code is None:
            code, text = 1, f"unexpected error: {type(error).__name__}: {text}"
        if not self.is_main:
            text = f"process {self.rank}: {text}"
        with suppress(RuntimeError, TimeoutError):  # the store may be gone with the main process
            self._asked(lambda store: store.compare_set(_FAILURE, "", json.dumps([code, text])))

    def _note(self) -> list[Any] | None:
        def look(store: Any) -> list[Any] | None:
            found = _seen_within(_NOTE_SECONDS, lambda: store.check([_FAILURE]))
            note: list[Any] | None = json.loads(store.get(_FAILURE)) if found else None
            return note

        with suppress(RuntimeError, TimeoutError):
            return self._asked(look, within=_NOTE_SECONDS)
        return None

    def _leave(self, error: BaseException, patience: float) -> bool:
        """Closes the connections; the main process, which may hold the store, goes last, and before that is waited for.

        A launcher ends all processes as soon as one has failed, so that nobody may go before the run is saved.

        Returns:
            Whether the main process has come to its end, as far as can be told.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # of a launcher, which would change the exit code
                signal.signal(number, signal.SIG_IGN)
        closing = self._close(error)
        try:
            return self._wait_for_main(patience)
        finally:
            for thread in closing:
                thread.join(timeout=_NOTE_SECONDS)

    def _close(self, error: BaseException) -> list[threading.Thread]:
        """Closes the connections, by which the others know that this process has failed.

        A group's close with the last reference to it, which the error's frames must not hold. What is still on its way
        through them may never arrive: that is waited for in threads, which end with the process.
        """
        if self._heartbeat is not None:
            self._heartbeat.stop()
        _clear_frames(error)
        gc.collect()  # a model that holds the devices' group may stand in a cycle of references
        host = [self._host]
        del self._host
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group(host[0])
        closing = [
            threading.Thread(target=close, name=OF_A_CONNECTION, daemon=True)
            for close in (host.clear, _end_device_group)
        ]
        for thread in closing:
            thread.start()
        return closing

    def _wait_for_main(self, patience: float) -> bool:
        def lead(store: Any) -> bool:
            store.set(_DONE, "")
            _seen_within(_NOTE_SECONDS, lambda: store.add(_LEFT, 0) >= self.count - 1)
            return True

        def follow(store: Any) -> bool:
            done = _seen_within(patience, lambda: store.check([_DONE]))
            store.add(_LEFT, 1)
            return done

        try:
            return self._asked(lead, within=_NOTE_SECONDS) if self.is_main else self._asked(follow, within=patience)
        except RuntimeError:
            return True  # the store went with the main process
        except TimeoutError:
            return False


def _seen_within(seconds: float, seen: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _done_within(work: Any, seconds: timedelta) -> bool:
    """Whether an exchange on the host comes to its end in that time; raises what ended it where that was a failure."""
    try:
        work.wait(seconds)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True


def _clear_frames(error: BaseException) -> None:
    """Drops the local variables of all frames that the error, and those which led to it, have left."""
    told: BaseException | None = error
    cleared: set[int] = set()
    while told is not None and id(told) not in cleared:  # two may name each other
        cleared.add(id(told))
        traceback.clear_frames(told.__traceback__)
        told = told.__cause__ or told.__context__


def _end_device_group() -> None:
    """NCCL would wait for what is under way on the device; it is given up."""
    with suppress(RuntimeError, ValueError):
        if "nccl" in dist.get_backend():
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _code_of(error: BaseException) -> int | None:
    """The exit code of what the user is told in one line: a `VamoFtError`, or the configuration's `ConfigError`."""
    code = getattr(error, "exit_code", None)
    return code if isinstance(code, int) else None


def _error_of(note: Sequence[Any]) -> VamoFtError:
    code, text = note
    return _ERRORS.get(code, VamoFtError)(text)


@contextmanager
def lost_processes_explained() -> Iterator[None]:
    """Turns the end of a connection in the block into one line."""
    try:
        yield
    except RuntimeError as error:
        if is_allocation_failure(error) or not _is_lost_connection(error):
            raise
        raise ProcessLostError(
            "another process of the run was lost (killed, out of memory on its machine, or cut off)"
        ) from None


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    words = ("by peer", "gloo", "nccl", "broken pipe", "socket", "timed out waiting")
    return isinstance(error, dist.DistError) or any(word in text for word in words)
