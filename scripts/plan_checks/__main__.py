"""Prints planned and measured peaks side by side."""

import argparse
import subprocess
import sys
from pathlib import Path

from scripts.plan_checks.cases import CASES
from scripts.plan_checks.clean import clean_environment

_ROOT = Path(__file__).resolve().parents[2]
_MIB = 1 << 20
_TOLERANCE, _LIBRARIES = 0.10, 64 * _MIB


def _bytes(what: str, case: str) -> int:
    """What one process said."""
    command = [sys.executable, "-m", "scripts.plan_checks.measured", what, case]
    with clean_environment() as environment:
        done = subprocess.run(command, cwd=_ROOT, env=environment, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def main() -> None:
    """One line of a Markdown table for each case; exit code 1 where a plan is off by a tenth and 64 MiB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    cases = parser.parse_args().cases or list(CASES)
    print("| configuration | planned MiB | measured MiB | error |\n|---|---:|---:|---:|", flush=True)
    exact = True
    for case in cases:
        planned, measured = _bytes("plan", case), _bytes("run", case)
        error = planned / measured - 1
        exact = exact and abs(planned - measured) <= max(_TOLERANCE * measured, _LIBRARIES)
        print(f"| {case} | {planned / _MIB:,.0f} | {measured / _MIB:,.0f} | {error:+.1%} |", flush=True)
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
