"""What is said when a run diverges, and what keeps a diverged state from being saved."""

from pathlib import Path

from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DivergenceError, VamoFtError
from vamo_ft.core.parameters import TrainableParameters, all_finite
from vamo_ft.core.protocols import SampleSource
from vamo_ft.data.sampling import sample_places
from vamo_ft.training.state import RunState

__all__ = ["check_weights", "explained"]

_SHOWN = 8


def check_weights(parameters: TrainableParameters, source: SampleSource, state: RunState) -> None:
    """Refuses to save a state that no run can go on from.

    Raises:
        DivergenceError: the last update left weights that are not finite.
    """
    if state.step > 0 and not all_finite(parameters.tensors):
        last = state.step - 1
        raise DivergenceError(
            f"step {state.step}: the weights are not finite after the update; they are not saved",
            step=last,
            samples=source.step_indices(last),
        )


def explained(error: DivergenceError, config: RunConfig, *, checkpoint: Path | None, advice: str) -> DivergenceError:
    """The error with the samples' places in the data, and the checkpoint that is left.

    Args:
        checkpoint: the newest intact one.
        advice: what to do.
    """
    parts = [str(error)]
    if error.samples:
        parts.append(f"its samples: {_listed(error.samples, config)}")
    parts.append("there is no checkpoint yet" if checkpoint is None else f"the last good checkpoint is {checkpoint}")
    return DivergenceError("; ".join([*parts, advice]), step=error.step, samples=error.samples)


def _listed(samples: tuple[int, ...], config: RunConfig) -> str:
    shown = samples[:_SHOWN]
    try:
        places = sample_places(config.data.train, config.data.format, shown, offline=True)
        words = [f"{index} ({place})" for index, place in zip(shown, places, strict=True)]
    except (VamoFtError, OSError):  # the file is not there any more, or another one
        words = [str(index) for index in shown]
    more = len(samples) - len(shown)
    return ", ".join(words) + (f" and {more} more" if more else "")
