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
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    work: Work = field(default_factory=Work)
    seconds: float = 0.0

    def state_dict(self) -> StateDict:
        """All counters."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: StateDict) -> "RunState":
        """Restores `state_dict`."""
        return cls(**{**state, "work": Work.from_state_dict(state["work"])})


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
