"""How much disk a configured run needs."""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from vamo_ft.config.method import SvrgConfig, VamoConfig, VamoLiteralConfig, ZoSvrgConfig
from vamo_ft.config.optimizer import PAGED, RULES, OptimizerConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import SaveError
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Stateful
from vamo_ft.training.callbacks import warn_of_failed_save
from vamo_ft.training.space import check_run_space, tensor_bytes

__all__ = ["check_space", "moment_bytes", "offloaded_bytes", "optimizer_bytes", "paged_bytes", "snapshot_bytes"]

_QUANTISED_FROM = 4096  # elements of a tensor, whose moments else are float32
_PAGED_FROM = 100_000  # elements of a tensor, whose moments else stay on the device
_BLOCK = 256  # elements with one scale
_CODES = 2 * 256 * 4  # bytes of the tables that the values of two moments are looked up in


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
    num_samples: int,
) -> None:
    """Whether the checkpoints that are to come fit; a warning where a failed save is one.

    What the state takes now is counted, the moments that the optimizer has not made yet, and the snapshot that the
    method has still to take.

    Args:
        root: folder of the checkpoints.
        owners: whose state is saved.
        model_bytes: of the model in a checkpoint.
        due: whether a checkpoint is, or may be, after a step.
        step: steps done.
        num_samples: of the training data.

    Raises:
        SaveError: they do not fit, and checkpoint.on_error is stop.
    """
    present = {name: tensor_bytes(owner.state_dict()) for name, owner in owners.items()}
    moments = max(present.pop("update_rule"), optimizer_bytes(config.optimizer, parameters))
    estimator = max(present.pop("estimator"), snapshot_bytes(config, parameters, num_samples=num_samples))
    keep = config.checkpoint.keep + (config.evaluation.ranked_by is not None)  # the best one is kept besides
    saves = (number for number in range(step + 1, num_steps + 1) if due(number) or number == num_steps)
    try:
        check_run_space(
            root,
            state_bytes=sum(present.values()) + moments + estimator,
            model_bytes=model_bytes,
            num_saves=sum(1 for _ in islice(saves, keep + 1)),
            keep=keep,
        )
    except SaveError as error:
        if config.checkpoint.on_error == "stop":
            raise
        warn_of_failed_save(error)


def optimizer_bytes(optimizer: OptimizerConfig, parameters: TrainableParameters, *, whole: bool = True) -> int:
    """Of what the update rule's state holds from its first step on: moments and master weights.

    Args:
        whole: of all processes together; else of this one alone.
    """
    masters = sum(4 * count for count, size in parameters.sizes(whole=whole) if size < 4)
    return moment_bytes(optimizer, parameters, whole=whole) + masters * optimizer.master_weights


def moment_bytes(optimizer: OptimizerConfig, parameters: TrainableParameters, *, whole: bool = True) -> int:
    """Of the moments alone: float32, or of 8 bits with a float32 scale for each block."""
    moments = {"adamw": 2, "adagrad": 1, "sgd": int(optimizer.momentum > 0), "sign_sgd": 0}[RULES[optimizer.name]]
    sizes = [count for count, _ in parameters.sizes(whole=whole)]
    if not optimizer.name.endswith("8bit"):
        return 4 * moments * sum(sizes)
    quantised = [size for size in sizes if size >= _QUANTISED_FROM]
    scales = sum(4 * -(-size // _BLOCK) for size in quantised)
    return moments * (sum(quantised) + scales + 4 * (sum(sizes) - sum(quantised))) + _CODES * len(quantised)


def paged_bytes(optimizer: OptimizerConfig, parameters: TrainableParameters) -> int:
    """Of an optimizer's state, what may leave the device: the moments of large tensors, without their scales."""
    if optimizer.name not in PAGED:
        return 0
    width = 1 if optimizer.name.endswith("8bit") else 4
    return 2 * width * sum(tensor.numel() for tensor in parameters.tensors if tensor.numel() >= _PAGED_FROM)


def offloaded_bytes(config: RunConfig, parameters: TrainableParameters, *, whole: bool = True) -> int:
    """Of a snapshot, what is kept in host memory: all but a table, which alone grows with the samples."""
    match config.method:
        case VamoConfig() | SvrgConfig() | VamoLiteralConfig() | ZoSvrgConfig() if config.method.snapshot.offload:
            return snapshot_bytes(config, parameters, num_samples=0, whole=whole)
    return 0


def snapshot_bytes(config: RunConfig, parameters: TrainableParameters, *, num_samples: int, whole: bool = True) -> int:
    """Of what the method's state holds from its first snapshot on; while a table is filled it is float64.

    Args:
        num_samples: of the training data, for a table, of which every process has all.
        whole: of all processes together; else of this one alone.
    """
    method, sizes = config.method, parameters.sizes(whole=whole)
    numel, copy = sum(count for count, _ in sizes), sum(count * size for count, size in sizes)
    match method:
        case VamoConfig():
            table = num_samples * (8 * method.probes + 5)
            informed = method.structure == "gradient_subspace"
            basis = GradientSubspace.state_bytes(numel, method.probes) if informed else 0
            return table + basis + copy * (method.source == "recompute")
        case SvrgConfig() | VamoLiteralConfig():
            return copy + 4 * numel
        case ZoSvrgConfig():
            return copy
    return 0
