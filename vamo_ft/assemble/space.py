"""How much disk a configured run needs."""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from vamo_ft.config.schema import OptimizerConfig, RunConfig
from vamo_ft.core.errors import SaveError
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Stateful
from vamo_ft.training.callbacks import warn_of_failed_save
from vamo_ft.training.space import check_run_space, tensor_bytes

__all__ = ["check_space"]


def check_space(
    config: RunConfig,
    root: Path,
    owners: Mapping[str, Stateful],
    parameters: TrainableParameters,
    *,
    model_bytes: int,
    due: Callable[[int], bool],
    step: int,
    num_steps: int,
) -> None:
    """Whether the checkpoints that are to come fit; a warning where a failed save is one.

    What the state takes now is counted, and the moments that the optimizer has not made yet. Snapshots that a method
    has still to take are known at the first save that holds one.

    Args:
        root: folder of the checkpoints.
        owners: whose state is saved.
        model_bytes: of the model in a checkpoint.
        due: whether a checkpoint is, or may be, after a step.
        step: steps done.

    Raises:
        SaveError: they do not fit, and checkpoint.on_error is stop.
    """
    present = {name: tensor_bytes(owner.state_dict()) for name, owner in owners.items()}
    moments = max(present.pop("update_rule"), _num_moments(config.optimizer) * 4 * parameters.numel)
    keep = config.checkpoint.keep + (config.evaluation.ranked_by is not None)  # the best one is kept besides
    saves = (number for number in range(step + 1, num_steps + 1) if due(number) or number == num_steps)
    try:
        check_run_space(
            root,
            state_bytes=sum(present.values()) + moments,
            model_bytes=model_bytes,
            num_saves=sum(1 for _ in islice(saves, keep + 1)),
            keep=keep,
        )
    except SaveError as error:
        if config.checkpoint.on_error == "stop":
            raise
        warn_of_failed_save(error)


def _num_moments(optimizer: OptimizerConfig) -> int:
    """Of the size of the parameters, in float32."""
    return {"adamw": 2, "adagrad": 1, "sgd": int(optimizer.momentum > 0), "sign_sgd": 0}[optimizer.name]
