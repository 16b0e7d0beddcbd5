"""How many steps a budget allows, and what was spent of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vamo_ft.assemble.pilot import Pilot, StepCost
from vamo_ft.config.budget import Budget, Currency
from vamo_ft.core.errors import UsageError
from vamo_ft.core.types import Work
from vamo_ft.training.ledger import Ledger

__all__ = ["Plan", "plan_steps", "price", "spent"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A method's length.

    Attributes:
        steps: as many as the budget allows.
        expected: what they spend, in the budget's currency.
        step_seconds: time of a step without a snapshot, in the pilot.
        warmup_steps: of the schedule, the same share of the run as in the file.
    """

    steps: int
    expected: float
    step_seconds: float
    warmup_steps: int


def plan_steps(pilot: Pilot, budget: Budget, *, label: str, warmup_steps: int) -> Plan:
    """The most steps whose cost, snapshots included, stays within the budget.

    Args:
        label: of the method.
        warmup_steps: in a run of `pilot.length` steps.

    Raises:
        UsageError: the budget does not reach for one.
    """
    steps, total = 0, 0.0
    while True:
        cost = price(pilot.cost(steps), pilot.ledger, budget.currency)
        if total + cost > budget.amount:
            break
        steps, total = steps + 1, total + cost
    if steps == 0:
        raise UsageError(
            f"compare.budget: {budget} does not reach for one step of {label}, which with what precedes it takes "
            f"{cost:.3g} {budget.currency}"
        )
    share = min(1.0, warmup_steps / pilot.length)
    return Plan(steps, total, pilot.cost(steps).update_seconds, round(share * steps))


def price(cost: StepCost, ledger: Ledger, currency: Currency) -> float:
    """What a step costs."""
    work: Work = cost.snapshot + cost.update
    return spent(ledger.figures(work, seconds=cost.snapshot_seconds + cost.update_seconds), currency)


def spent(figures: Mapping[str, Any], currency: Currency) -> float:
    """What a line of metrics says was spent."""
    match currency:
        case "evaluations":
            return float(figures["forward_evals"] + 2 * figures["backward_evals"])
        case "tokens":
            return float(figures["forward_tokens"] + 2 * figures["backward_tokens"])
        case "flops" | "seconds":
            return float(figures[currency])
