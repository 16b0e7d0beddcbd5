"""Passes over many samples that a stop may interrupt, and a resumed run goes on with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vamo_ft.core.errors import StopRequested
from vamo_ft.core.hashing import Domain, HashKey, permutation, random_bits
from vamo_ft.core.memory import memory_explained
from vamo_ft.core.protocols import Progress, ProgressTask, Runtime, SampleSource, StateDict
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Batch, Work

__all__ = ["PassState", "Reference", "SnapshotPasses", "Stages", "reference_samples", "systematic_counts"]


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
        runtime: Runtime,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._source = source
        self._groups = groups
        self._state = state
        self._task = task
        self._runtime = runtime
        self._stop_requested = stop_requested

    def is_done(self, stage: int) -> bool:
        """Whether nothing of this stage is left."""
        return self._state.cursor >= (stage + 1) * len(self._groups)

    def batches(self, stage: int) -> Iterator[tuple[Batch, bool]]:
        """What is left of the stage and falls to this process; the cursor moves when the next one is asked for.

        Yields:
            a batch to pass over, and whether what comes of it counts (see `Runtime.rounds`).

        Raises:
            StopRequested: between two batches.
        """
        for groups, own, counts in self._runtime.rounds(self._groups[self._state.cursor - stage * len(self._groups) :]):
            if self._stop_requested():
                raise StopRequested("between two batches")
            if own is not None:
                yield self._source.batch(own), counts
            self._state.cursor += len(groups)
            self._task.advance(sum(map(len, groups)))


@dataclass(slots=True)
class SnapshotPasses:
    """Makes passes over the training data.

    Attributes:
        token_budget: tokens, padding included, of one batch.
        progress: shows how far a pass is.
        stop_requested: asked before every batch.
        runtime: shares the batches out.
    """

    token_budget: int
    progress: Progress
    stop_requested: Callable[[], bool]
    runtime: Runtime = field(default_factory=LocalRuntime)
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
    def over(
        self,
        source: SampleSource,
        indices: Sequence[int],
        *,
        stages: int,
        state: PassState,
        sums: Sequence[Tensor] = (),
        marks: Sequence[Tensor] = (),
    ) -> Iterator[Stages]:
        """A pass over the samples `indices`, sorted by length and packed into batches, `stages` times.

        Processes share the batches out. Within the block each of them adds its own part to `sums`; before and after it,
        also after a stop, all of them hold the whole.

        Args:
            sums: tensors that the pass adds to, in place.
            marks: tensors in which it replaces zeros, in place, by the same values whichever process does it.

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
            before, state.work = state.work, Work()
            if not self.runtime.is_main:  # what is there already counts once
                for tensor in sums:
                    tensor.zero_()
            try:
                yield Stages(source, groups, state, task, self.runtime, self.stop_requested)
            except StopRequested:  # also by the objective, before the pass over a batch
                self._join(state, before, sums, marks)
                raise StopRequested("stopped in a snapshot") from None
            self._join(state, before, sums, marks)

    def _join(self, state: PassState, before: Work, sums: Sequence[Tensor], marks: Sequence[Tensor]) -> None:
        counts = state.work.state_dict()
        spent = torch.tensor(list(counts.values()))
        self.runtime.sum_([*sums, spent])
        self.runtime.largest_(marks)
        state.work = before + Work(**dict(zip(counts, spent.tolist(), strict=True)))


@dataclass(frozen=True, slots=True)
class Reference:
    """Samples whose weighted mean at a snapshot stands for the mean under the law by which steps draw theirs.

    Attributes:
        indices: (m,) int64, each sample once, ascending.
        frequencies: (m,) float64, how often each counts.
    """

    indices: Tensor
    frequencies: Tensor

    @property
    def samples(self) -> list[int]:
        """Their indices as a list."""
        return self.indices.tolist()

    def of(self, samples: Sequence[int]) -> Tensor:
        """The frequencies of some of the samples, float64 on the host."""
        return self.frequencies[torch.searchsorted(self.indices, torch.tensor(samples))]


def reference_samples(source: SampleSource, *, subset: int | None, seed: int, step: int) -> Reference:
    """The samples of a snapshot's mean.

    All of them count as often as steps draw them, so that a batch's terms less the mean's have mean zero. M of them are
    drawn without replacement where steps draw all alike; else by systematic sampling with probability proportional to
    frequency (Madow 1949): in a random order they stand side by side, each as wide as it is frequent, and M points at
    equal distances count how often each is taken. On average that is its share of M, and never off
    by one.

    Args:
        source: n samples.
        subset: M; None, or n and more: all of them.
        seed: the run's seed.
        step: of the snapshot; the draw is keyed by it.
    """
    count = source.num_samples
    frequencies = torch.tensor([source.frequency(index) for index in range(count)], dtype=torch.float64)
    if subset is None or subset >= count:
        return Reference(torch.arange(count), frequencies)
    order = permutation(count, HashKey(seed, Domain.SUBSET, step, 0))
    if bool((frequencies == 1).all()):
        return Reference(order[:subset].sort().values, torch.ones(subset, dtype=torch.float64))
    bits = random_bits(HashKey(seed, Domain.SUBSET, step, 1), 0, 1, device=torch.device("cpu"))
    shift = (int(bits) % 2**32 + 0.5) / 2**32
    times = torch.empty(count, dtype=torch.int64)
    times[order] = systematic_counts(frequencies[order], count=subset, shift=shift)
    samples = times.nonzero().squeeze(1)
    return Reference(samples, times[samples].double())


def systematic_counts(sizes: Tensor, *, count: int, shift: float) -> Tensor:
    """(n,) int64: how many of the points `shift, shift + 1, ... shift + count - 1` fall on each of n intervals.

    Args:
        sizes: (n,) float64, relative; the intervals fill [0, count) in their order.
        shift: in (0, 1).
    """
    ends = sizes.cumsum(0) * (count / float(sizes.sum()))
    ends[-1] = count
    before = (ends - shift).ceil().long()  # points below each end
    return before.diff(prepend=before.new_zeros(1))
