"""How many samples a forward and backward pass takes."""

import logging
from collections.abc import Callable
from heapq import nlargest
from itertools import cycle, islice

import torch

from vamo_ft.assemble.space import moment_bytes, offloaded_bytes, paged_bytes
from vamo_ft.config.method import ForwardGradientConfig, SvrgConfig, VamoConfig, VamoLiteralConfig, ZoSvrgConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import DeviceMemoryError, first_line
from vamo_ft.core.memory import KEEP_LESS, is_allocation_failure, memory_explained
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, GradientEstimator, Objective, Runtime, SampleSource
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.forward_gradient import ForwardGradient
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa

__all__ = ["largest_that_fits", "micro_batch_size"]

_log = logging.getLogger("vamo_ft")


def micro_batch_size(
    config: RunConfig,
    objective: Objective,
    parameters: TrainableParameters,
    directions: Directions | None,
    runtime: Runtime,
    source: SampleSource,
    *,
    chosen: int | None,
) -> int:
    """The configured size, the whole batch, or (auto) the largest that fits.

    To find that out leaves no trace: parameters, gradients, generators and whatever a run counts are as before.

    Args:
        chosen: what auto chose when the run began; it is not chosen again.

    Raises:
        DeviceMemoryError: not even one sample fits.
    """
    size = config.training.micro_batch_size
    if size != "auto":
        return size or config.training.batch_size
    if chosen is not None:
        return chosen
    probe = _probe(config, objective, parameters, directions, runtime.alone())
    longest = nlargest(source.batch_size, range(source.num_samples), key=source.length)
    samples = list(islice(cycle(longest), source.batch_size))  # a batch larger than the data repeats samples

    def attempt(size: int) -> None:
        probe.estimate([source.batch(samples[:size])], 0)

    was_training = objective.module.training
    try:
        with memory_explained(
            "setting apart what the method and its optimizer keep",
            remedy=KEEP_LESS,
        ):
            kept = torch.empty(_kept_bytes(config, parameters), dtype=torch.uint8, device=runtime.device)
        most = runtime.evenly(source.batch_size, at_most=source.batch_size)
        found = largest_that_fits(
            attempt, most, after=lambda: _forget(parameters, runtime), failed_anywhere=runtime.any
        )
        del kept
    finally:
        _forget(parameters, runtime)
        objective.module.train(was_training)
    _log.info(
        "training.micro_batch_size: auto takes %d of %d samples (the longest has %d tokens)",
        found,
        source.batch_size,
        source.length(longest[0]),
    )
    return found


def largest_that_fits(
    attempt: Callable[[int], None],
    size: int,
    *,
    after: Callable[[], None],
    failed_anywhere: Callable[[bool], bool] = lambda failed: failed,
) -> int:
    """`size` or the first of its halves, rounded up, for which `attempt` does not run out of memory.

    Args:
        after: called after every attempt that failed, when nothing of it is held any more.
        failed_anywhere: told whether this process failed, says whether any did.

    Raises:
        DeviceMemoryError: even 1 does.
    """
    while failed_anywhere((failure := _failure_of(attempt, size)) is not None):
        after()
        if size == 1:
            elsewhere = "in another process"
            raise DeviceMemoryError(
                f"out of memory in a pass over the longest sample alone: {failure or elsewhere}; lower "
                "data.max_length, set training.activation_checkpointing, or train an adapter (model.adapter)"
            )
        size = (size + 1) // 2
    return size


def _failure_of(attempt: Callable[[int], None], size: int) -> str | None:
    """What was said when memory ran out; the error itself would hold on to the tensors of its frames."""
    try:
        attempt(size)
    except (RuntimeError, MemoryError) as error:
        if not is_allocation_failure(error):
            raise
        return first_line(error, otherwise="an allocation failed")
    return None


def _probe(
    config: RunConfig,
    objective: Objective,
    parameters: TrainableParameters,
    directions: Directions | None,
    runtime: Runtime,
) -> GradientEstimator:
    """One of no state, whose passes are the largest of the method's: it learns nothing that the run's does not know."""
    seed = config.run.seed
    if isinstance(config.method, ForwardGradientConfig):
        assert directions is not None
        return ForwardGradient(objective, parameters, directions, runtime, num_probes=1, seed=seed)
    if config.method.needs_gradient:
        return FirstOrder(objective, parameters, runtime, seed=seed)
    assert directions is not None
    whole = config.objective.answer_tokens is not None
    return Spsa(
        LossProbe(objective, parameters, directions, runtime, whole=whole),
        runtime,
        num_probes=1,
        eps=1e-3,  # of no account for memory
        difference="central",
        seed=seed,
        piecewise_constant=True,  # losses that do not move are for the run to judge
    )


def _kept_bytes(config: RunConfig, parameters: TrainableParameters) -> int:
    """What later steps hold on the device during a pass, and the first step does not."""
    optimizer, copies = config.optimizer, 0
    offload = parameters.device.type != "cpu" and offloaded_bytes(config, parameters) > 0
    kept = 0 if optimizer.name == "adagrad" else moment_bytes(optimizer, parameters)  # whose sums are there
    kept -= paged_bytes(optimizer, parameters)
    match config.method:
        case SvrgConfig() | VamoLiteralConfig():
            # the full gradient, the snapshot, and the present values while the model is at the snapshot
            copies = 1 if offload else 3
        case ZoSvrgConfig():
            copies = 0 if offload else 2
        case VamoConfig() if config.method.source == "recompute":
            copies = 0 if offload else 2
    return kept + 4 * copies * parameters.numel


def _forget(parameters: TrainableParameters, runtime: Runtime) -> None:
    """Drops gradients, and memory that the device's allocator holds in pieces of the wrong size."""
    parameters.clear_gradients()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
