"""Command line: prepares, runs the rounds in parallel, and tells what was survived."""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from scripts.arguments import cases_of, positive
from scripts.torturing.cases import CASES, prepare
from scripts.torturing.rounds import RoundResult, plan_round, run_reference, run_round, set_up_worker
from scripts.torturing.summary import summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 if a run lost anything, and keeps the folders of those that did."""
    options = _parse(arguments)
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="vamo-ft-torture-", dir=options.folder))
    numbers = range(options.rounds) if options.round is None else [options.round]
    plans = [plan_round(number, seed=options.seed, cases=options.cases) for number in numbers]
    results: list[RoundResult] = []
    prepare(root)
    context = multiprocessing.get_context("spawn")  # a worker has one thread, so that it can fork
    with ProcessPoolExecutor(options.jobs, context, initializer=set_up_worker, initargs=(root,)) as workers:
        used = sorted({plan.case for plan in plans}, key=options.cases.index)
        print(f"seed {options.seed}; {', '.join(used)}; in {root}", flush=True)
        for reference in [workers.submit(run_reference, root, case) for case in used]:
            reference.result()
        for done in as_completed([workers.submit(run_round, root, plan) for plan in plans]):
            results.append(done.result())
            _tell(results[-1], options.cases)
    print(f"\n{summary(results, cases=used)} in {(time.monotonic() - began) / 60:.0f} minutes")
    if any(result.loss is not None for result in results):
        sys.exit(1)
    shutil.rmtree(root)


def _tell(result: RoundResult, cases: Sequence[str]) -> None:
    plan = result.plan
    story = ", ".join(f"{attack} [{place}]" for attack, place in result.hits) or "finished before anything was done"
    print(f"round {plan.number} {plan.case}: {story}", flush=True)
    if result.loss is not None:
        print(
            f"LOST in round {plan.number}: {result.loss}\n  everything is in {result.folder}; to repeat it: "
            f"scripts/torture --seed {plan.seed} --round {plan.number} --cases {','.join(cases)}",
            flush=True,
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/torture",
        description="Kills, stops, starves and damages real training runs of a tiny model, resumes them until they are "
        "done, and compares weights, metrics and files with those of a run left alone.",
    )
    parser.add_argument("--rounds", type=positive, default=20, help="runs that are attacked (default: %(default)s)")
    parser.add_argument("--round", type=int, default=None, metavar="N", help="only this one, counted from 0")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument(
        "--cases", type=cases_of(CASES), default=list(CASES), help=f"of {','.join(CASES)}; default: all"
    )
    parser.add_argument("--jobs", type=positive, default=2, help="rounds at the same time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the temporary folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
