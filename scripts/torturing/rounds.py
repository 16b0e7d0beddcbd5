"""One round: a run that is attacked a few times, then left alone until it is done, and judged."""

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.torturing.attacks import ATTACKS
from scripts.torturing.cases import run_directory
from scripts.torturing.outcome import differences, read_outcome
from scripts.torturing.process import ENVIRONMENT, load_what_training_needs
from scripts.torturing.trial import Loss, Trial

__all__ = ["Plan", "RoundResult", "plan_round", "run_reference", "run_round", "set_up_worker"]

_TRIES = 3
"""Processes after the last attack. One is enough, unless that attack was a full disk at the very end."""


@dataclass(frozen=True)
class Plan:
    """What a round does, decided by seed and number.

    Attributes:
        seed: of the command.
        number: counted from 0.
        case: the configuration.
        attacks: names, in their order.
    """

    seed: int
    number: int
    case: str
    attacks: tuple[str, ...]


@dataclass(frozen=True)
class RoundResult:
    """What came of it.

    Attributes:
        hits: attack and place, of those that came before the run was done.
        starts: how many processes it took, by the way in which they were started.
        folder: where the run is, if it lost something.
        loss: what was lost, or None.
    """

    plan: Plan
    folder: Path
    hits: tuple[tuple[str, str], ...] = ()
    starts: dict[str, int] = field(default_factory=dict)
    loss: str | None = None


def plan_round(number: int, *, seed: int, cases: Sequence[str]) -> Plan:
    """Cases and first attacks take turns, so that few rounds see all of them; up to two more attacks follow."""
    chance = random.Random(f"plan {seed} {number}")
    names = list(ATTACKS)
    turn, position = divmod(number, len(cases))
    first = names[(turn + 2 * position) % len(names)]
    return Plan(seed, number, cases[position], (first, *chance.choices(names, k=chance.randrange(3))))


def set_up_worker(root: Path) -> None:
    """Once in every process that starts runs, before anything else."""
    os.environ.update({**ENVIRONMENT, "HF_HOME": str(root / "cache")})
    load_what_training_needs()


def run_reference(root: Path, case: str) -> None:
    """The run left alone, with which the others are compared."""
    folder = root / case / "reference"
    folder.mkdir(parents=True)
    trial = Trial(folder, root / f"{case}.yaml", chance=random.Random(), first_start=1)
    with trial.process() as process:
        trial.wait_for_the_end(process)
        trial.check(process, allowed=(0,))


def run_round(root: Path, plan: Plan) -> RoundResult:
    """A round in a folder of its own, which stays if something was lost."""
    folder = root / plan.case / f"round-{plan.number:03d}"
    folder.mkdir(parents=True)
    chance = random.Random(f"round {plan.seed} {plan.number}")
    trial = Trial(folder, root / f"{plan.case}.yaml", chance=chance, first_start=plan.number % 4)
    loss = None
    try:
        for name in plan.attacks:
            if trial.is_finished():
                break
            ATTACKS[name](trial)
        _finish(trial)
        reference = read_outcome(run_directory(root / plan.case / "reference"))
        if found := differences(reference, read_outcome(trial.run)):
            loss = "; ".join(found)
    except Loss as error:
        loss = str(error)
    if loss is None:
        shutil.rmtree(folder)
    return RoundResult(plan, folder, hits=tuple(trial.hits), starts=dict(trial.starts), loss=loss)


def _finish(trial: Trial) -> None:
    for _ in range(_TRIES):
        newest = next(iter(trial.intact()), None)
        with trial.process() as process:
            trial.wait_for_the_end(process)
            trial.check(process, allowed=(0,))
            trial.check_where_it_went_on(process, newest)
        if trial.is_finished():
            return
    raise Loss("it does not come to an end")
