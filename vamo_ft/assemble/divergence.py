"""What is said when a run diverges, and what keeps a diverged state from being saved."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vamo_ft.config.data import DataSetConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DivergenceError, VamoFtError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import SampleSource
from vamo_ft.data.mixture import Origin
from vamo_ft.data.places import sample_places
from vamo_ft.training.state import RunState

__all__ = ["check_weights", "explained"]

_SHOWN = 8


def check_weights(parameters: TrainableParameters, source: SampleSource, state: RunState) -> None:
    """Refuses to save a state that no run can go on from.

    Raises:
        DivergenceError: the last update left weights that are not finite.
    """
    parameters.settle()
    if state.step > 0 and not parameters.all_finite():
        last = state.step - 1
        raise DivergenceError(
            f"step {state.step}: the weights are not finite after the update; they are not saved",
            step=last,
            samples=source.step_indices(last),
        )


def explained(
    error: DivergenceError,
    config: RunConfig,
    *,
    origin: Callable[[int], Origin],
    checkpoint: Path | None,
    advice: str,
) -> DivergenceError:
    """The error with the samples' places in the data, and the checkpoint that is left.

    Args:
        origin: tells the rows that a sample comes from.
        checkpoint: the newest intact one.
        advice: what to do.
    """
    parts = [str(error)]
    if error.samples:
        parts.append(f"its samples: {_listed(error.samples, origin, config.data.training_sets)}")
    parts.append("there is no checkpoint yet" if checkpoint is None else f"the last good checkpoint is {checkpoint}")
    return DivergenceError("; ".join([*parts, advice]), step=error.step, samples=error.samples)


def _listed(samples: tuple[int, ...], origin: Callable[[int], Origin], data_sets: Sequence[DataSetConfig]) -> str:
    shown = {index: origin(index) for index in samples[:_SHOWN]}
    try:
        places = sample_places(data_sets, [(number, rows[:_SHOWN]) for number, rows in shown.values()])
        words = [
            f"{index} ({_joined(own, len(rows))})"
            for (index, (_, rows)), own in zip(shown.items(), places, strict=True)
        ]
    except (VamoFtError, OSError):  # the file is not there any more, or another one
        words = [str(index) for index in shown]
    return _joined(words, len(samples))


def _joined(words: Sequence[str], count: int) -> str:
    return ", ".join(words) + (f" and {count - len(words)} more" if count > len(words) else "")
