"""Puts a checkpoint's states back into the parts of a run, as far as they still mean the same."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from vamo_ft.core.errors import DataError
from vamo_ft.core.memory import is_allocation_failure
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import StateDict, Stateful
from vamo_ft.optim.carriers import MASTER
from vamo_ft.training.checkpoint import Checkpoint
from vamo_ft.training.state import RunState

__all__ = ["remove_seed_log", "restore", "restored_run_state"]

_log = logging.getLogger("vamo_ft")

_OPTIONAL = ("evaluation", "seed_log")
"""Held-out data, and logs, may be new."""

_UPDATE_ONLY = ("optimizer.", "schedule.", "training.max_grad_norm:")
"""Settings that change what an update does with an estimate, and not the estimate."""

_SHAPELESS = ("step", "qmap1", "qmap2", "absmax1", "absmax2")
"""What an optimizer keeps of a parameter that has not its shape."""


@contextmanager
def _states_explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns a state that is not what its owner expects, as another version may have written it, into one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_allocation_failure(error):
            raise
        raise DataError(
            f"{checkpoint.path}: its state is not one that this version reads ({type(error).__name__}: {error}); it "
            f"was written by vamo-ft {checkpoint.facts['version']}: go on with that, or start anew with --fresh"
        ) from error


def restored_run_state(checkpoint: Checkpoint) -> RunState:
    """The run's counters.

    Raises:
        DataError: they are not those of this version.
    """
    with _states_explained(checkpoint):
        return RunState.from_state_dict(checkpoint.load("run"))


def restore(
    checkpoint: Checkpoint, owners: Mapping[str, Stateful], parameters: TrainableParameters, *, changes: Sequence[str]
) -> None:
    """Loads every owner's state; after `changes` only what survives them, and says what does not.

    The state of the estimator and of the directions (snapshots, tables, learnt coefficients) is dropped with any change
    that reaches an estimate: it belongs to another method, other samples or another loss, even where the shapes agree.
    The optimizer's moments are dropped with another optimizer, else those whose parameter has another shape are; master
    weights are no moments, and stay with any optimizer. No seed log is written any more: it could not rebuild the run.

    Args:
        owners: by their name in the checkpoint.
        changes: allowed differences to the checkpoint's run, as `key: old -> new`; empty: none.

    Raises:
        DataError: a state is missing, or is not one that this version reads.
    """
    with _states_explained(checkpoint):
        _restore(checkpoint, owners, parameters, changes=changes)


def _restore(
    checkpoint: Checkpoint, owners: Mapping[str, Stateful], parameters: TrainableParameters, *, changes: Sequence[str]
) -> None:
    for name, owner in owners.items():
        if name in _OPTIONAL and not checkpoint.holds(name):  # a part that is new to the run
            continue
        if not changes:
            owner.load_state_dict(checkpoint.load(name))
            continue
        match name:
            case "seed_log":
                owner.load_state_dict({"length": None})
            case "estimator" | "directions" if not all(change.startswith(_UPDATE_ONLY) for change in changes):
                if checkpoint.holds(name) and _has_content(checkpoint.load(name)):
                    _log.warning("the state of the %s is dropped: it belongs to other settings", name)
            case "evaluation" if any(change.startswith("model.") for change in changes):
                _log.warning("evaluations so far are not compared with those to come: they belong to another model")
            case "update_rule":
                owner.load_state_dict(_surviving_moments(checkpoint.load(name), parameters, changes))
            case _:
                owner.load_state_dict(checkpoint.load(name))


def remove_seed_log(path: Path, *, reason: str) -> None:
    """Removes the seed log of a run that cannot be rebuilt from it any more."""
    if path.is_file():
        _log.warning("%s is removed: %s", path, reason)
        path.unlink()


def _surviving_moments(state: StateDict, parameters: TrainableParameters, changes: Sequence[str]) -> StateDict:
    if any(change.startswith("optimizer.name:") for change in changes):
        masters = {name: {MASTER: each[MASTER]} for name, each in state.items() if MASTER in each}
        if any(set(each) - {MASTER} for each in state.values()):
            _log.warning("the state of the optimizer is dropped: it belongs to another optimizer")
        state = masters
    places = {name: index for index, name in enumerate(parameters.names)}

    def fits(name: str, value: Tensor) -> bool:
        place = places.get(name)
        return place is not None and parameters.own(place, value).shape == parameters.tensors[place].shape

    fitting = {
        name: moments
        for name, moments in state.items()
        if all(
            fits(name, value) for key, value in moments.items() if isinstance(value, Tensor) and key not in _SHAPELESS
        )
    }
    if dropped := sorted(state.keys() - fitting.keys()):
        _log.warning(
            "the optimizer's state of %d of %d parameters is dropped, such as %s: they have another shape or are not "
            "trained",
            len(dropped),
            len(state),
            dropped[0],
        )
    return fitting


def _has_content(state: StateDict) -> bool:
    return any(value is not None for value in state.values())
