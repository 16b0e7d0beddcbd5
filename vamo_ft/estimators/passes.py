"""Passes over many samples that a stop may interrupt, and a resumed run goes on with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from vamo_ft.core.errors import StopRequested
from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.memory import memory_explained
from vamo_ft.core.protocols import Progress, ProgressTask, SampleSource, StateDict
from vamo_ft.core.types import Batch, Work

__all__ = ["PassState", "SnapshotPasses", "Stages", "reference_samples"]


@dataclass(slots=True)
class PassState:
    """How far a pass has come, and what it has cost so far.

    Attributes:
        token_budget: the size of its batches: a pass cut into other ones cannot be continued.
        cursor: batches done, over all stages.
        work: evaluations spent.
        complete: whether the pass is over.
    """

    token_budget: int
    cursor: int = 0
    work: Work = field(default_factory=Work)
    complete: bool = False

    def state_dict(self) -> StateDict:
        """All of it."""
        return {
            "token_budget": self.token_budget,
            "cursor": self.cursor,
            "work": self.work.state_dict(),
            "complete": self.complete,
        }

    @classmethod
    def from_state_dict(cls, state: StateDict) -> "PassState":
        """Restores `state_dict`."""
        return cls(**{**state, "work": Work.from_state_dict(state["work"])})


class Stages:
    """The batches of a pass that goes over the same groups of samples several times, such as once per probe point."""

    def __init__(
        self,
        source: SampleSource,
        groups: Sequence[Sequence[int]],
        state: PassState,
        task: ProgressTask,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._source = source
        self._groups = groups
        self._state = state
        self._task = task
        self._stop_requested = stop_requested

    def is_done(self, stage: int) -> bool:
        """Whether nothing of this stage is left."""
        return self._state.cursor >= (stage + 1) * len(self._groups)

    def batches(self, stage: int) -> Iterator[Batch]:
        """What is left of the stage; the cursor moves when the consumer asks for the next one.

        Raises:
            StopRequested: between two batches.
        """
        for group in self._groups[self._state.cursor - stage * len(self._groups) :]:
            if self._stop_requested():
                raise StopRequested("between two batches")
            yield self._source.batch(group)
            self._state.cursor += 1
            self._task.advance(len(group))


@dataclass(slots=True)
class SnapshotPasses:
    """Makes passes over the training data.

    Attributes:
        token_budget: tokens, padding included, of one batch.
        progress: shows how far a pass is.
        stop_requested: asked before every batch.
    """

    token_budget: int
    progress: Progress
    stop_requested: Callable[[], bool]
    _abandoned: Work = field(default_factory=Work, init=False)

    def begin(self) -> PassState:
        """The state of a pass that has not begun; the cost of one that begins anew is not forgotten."""
        state = PassState(self.token_budget, work=self._abandoned)
        self._abandoned = Work()
        return state

    def restored(self, state: StateDict) -> PassState | None:
        """The state of a saved pass; None where it is unfinished and was cut into other batches: it begins anew."""
        restored = PassState.from_state_dict(state)
        if restored.complete or restored.token_budget == self.token_budget:
            return restored
        self._abandoned = restored.work
        return None

    @contextmanager
    def over(self, source: SampleSource, indices: Sequence[int], *, stages: int, state: PassState) -> Iterator[Stages]:
        """A pass over the samples `indices`, sorted by length and packed into batches, `stages` times.

        Raises:
            DeviceMemoryError: names the batch that did not fit.
            StopRequested: between two batches.
        """
        groups = source.groups(indices, token_budget=self.token_budget)
        sizes = [len(group) for _ in range(stages) for group in groups]

        def place() -> str:
            group = groups[state.cursor % len(groups)]
            longest = max(source.length(index) for index in group)
            return f"a snapshot (a batch of {len(group)} samples, the longest row of {longest} tokens)"

        with (
            self.progress.task("snapshot", sum(sizes), done=sum(sizes[: state.cursor])) as task,
            memory_explained(place, remedy="lower training.forward_batch_tokens, or data.max_length"),
        ):
            try:
                yield Stages(source, groups, state, task, self.stop_requested)
            except StopRequested:  # also by the objective, before the pass over a batch
                raise StopRequested("stopped in a snapshot") from None


def reference_samples(num_samples: int, *, subset: int | None, seed: int, step: int) -> list[int]:
    """The samples whose mean at a snapshot stands for the mean over all, ascending.

    Args:
        num_samples: n, of the whole data.
        subset: M of them, drawn without replacement; None, or n and more: all of them.
        seed: the run's seed.
        step: of the snapshot; the draw is keyed by it.
    """
    if subset is None or subset >= num_samples:
        return list(range(num_samples))
    bits = random_bits(HashKey(seed, Domain.SUBSET, step, 0), 0, num_samples, device=torch.device("cpu"))
    return sorted(torch.argsort(bits, stable=True)[:subset].tolist())
