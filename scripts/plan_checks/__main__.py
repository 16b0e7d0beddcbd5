"""Prints planned and measured peaks side by side."""

import argparse
import socket
import subprocess
import sys
from pathlib import Path

from scripts.plan_checks.cases import CASES
from scripts.plan_checks.clean import clean_environment

_ROOT = Path(__file__).resolve().parents[2]
_MIB = 1 << 20
_TOLERANCE, _LIBRARIES = 0.10, 64 * _MIB


def _bytes(what: str, case: str, *, processes: int = 1) -> list[int]:
    """What each of some processes said."""
    command = [sys.executable, "-m", "scripts.plan_checks.measured", what, case]
    started = []
    with clean_environment() as environment:
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for rank in range(processes):
            own = {**environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, cwd=_ROOT, env=own, text=True, stdout=pipe, stderr=pipe))
        said = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return [int(output.split()[-1]) for output, _ in said]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """One line of a Markdown table for each case; exit code 1 where a plan is off by a tenth and 64 MiB.

    Of several processes each one's peak is told, and the plan compared with the highest.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    cases = parser.parse_args().cases or list(CASES)
    print("| configuration | planned MiB | measured MiB | error |\n|---|---:|---:|---:|", flush=True)
    exact = True
    for case in cases:
        (planned,), measured = _bytes("plan", case), _bytes("run", case, processes=CASES[case].processes)
        error = planned / max(measured) - 1
        exact = exact and abs(planned - max(measured)) <= max(_TOLERANCE * max(measured), _LIBRARIES)
        peaks = " and ".join(f"{peak / _MIB:,.0f}" for peak in measured)
        print(f"| {case} | {planned / _MIB:,.0f} | {peaks} | {error:+.1%} |", flush=True)
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
