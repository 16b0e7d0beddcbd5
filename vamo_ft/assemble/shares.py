"""How much of a run's passes falls to one of several processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from vamo_ft.assemble.parts import Parts
from vamo_ft.config.method import VamoLiteralConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Runtime

__all__ = ["Shares", "shares_of"]


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of all passes, by the tokens in them, that the process with most of them makes; 1 where it is alone.

    Attributes:
        step: of the passes over a step's micro-batches, by samples.
        snapshot: of those over the training data in a snapshot.
        evaluation: of those over the held-out data.
    """

    step: float = 1.0
    snapshot: float = 1.0
    evaluation: float = 1.0


def shares_of(config: RunConfig, parts: Parts, *, micro_batch_size: int) -> Shares:
    """What falls to the first process, which gets what cannot be divided.

    Args:
        parts: whose runtime deals samples out, as that of the run does.
        micro_batch_size: at most.
    """
    source, held_out, runtime = parts.source, parts.held_out, parts.runtime
    size = runtime.evenly(source.batch_size, at_most=micro_batch_size)
    micro_batches = [min(size, source.batch_size - start) for start in range(0, source.batch_size, size)]
    budget = config.training.forward_batch_tokens
    groups = source.groups(
        range(source.num_samples), token_budget=1 if isinstance(config.method, VamoLiteralConfig) else budget
    )
    evaluated = []
    if held_out is not None:
        evaluated = [sum(map(held_out.data.input_length, batch)) for batch in held_out.groups(token_budget=budget)]
    return Shares(
        step=_share(runtime, micro_batches),
        snapshot=_share(runtime, [sum(map(source.length, group)) for group in groups]),
        evaluation=_share(runtime, evaluated),
    )


def _share(runtime: Runtime, sizes: Sequence[int]) -> float:
    return sum(runtime.mine(sizes)) / sum(sizes) if sizes else 1.0
