"""Where a run stands, and what one step leaves behind."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from vamo_ft.core.protocols import StateDict
from vamo_ft.core.types import Work

__all__ = ["RunState", "StepRecord"]


@dataclass(slots=True)
class RunState:
    """The run's own counters.

    Attributes:
        step: updates done.
        samples: training samples seen.
        tokens: their input tokens, without padding.
        work: evaluations spent, snapshots included.
        seconds: time spent training, evaluation and saving left out.
        micro_batch_size: chosen for this run, and kept when it goes on; None where the configuration says it.
        rollbacks: how often the run diverged and went on from a checkpoint. What was spent before counts in `work` and
            `seconds`, not in the other counters.
        learning_rate_scale: factor on the schedule's learning rate.
        skipped: steps, counted from 0, that make no update: their batch diverged. Every other step keeps its samples.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    work: Work = field(default_factory=Work)
    seconds: float = 0.0
    micro_batch_size: int | None = None
    rollbacks: int = 0
    learning_rate_scale: float = 1.0
    skipped: list[int] = field(default_factory=list)

    def state_dict(self) -> StateDict:
        """All counters."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: StateDict) -> "RunState":
        """Restores `state_dict`."""
        return cls(**{**state, "work": Work.from_state_dict(state["work"])})

    def roll_back(self, diverged: "RunState", *, step: int | None, factor: float) -> None:
        """Makes an earlier state of the run, this one, the one to go on from after `diverged`.

        Args:
            step: left out from now on, unless None.
            factor: on the learning rate, beside earlier ones.
        """
        self.work, self.seconds = diverged.work, diverged.seconds
        self.rollbacks = diverged.rollbacks + 1
        self.learning_rate_scale = diverged.learning_rate_scale * factor
        self.skipped = sorted({*diverged.skipped, *([] if step is None else [step])})


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One update, as callbacks see it.

    Attributes:
        loss: mean loss over the step's samples, before the update.
        learning_rate: of this update.
        measured: what the update rule measured.
        metrics: the method's own figures.
    """

    loss: float
    learning_rate: float
    measured: Mapping[str, Tensor | float | None]
    metrics: Mapping[str, Tensor | float]
