"""Runs of two processes: the same results as one, the same bits in both, and one end for both."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.replicas import BATCH, METHODS, SAMPLES, WIDTH, cases, prepared, unreached
from tests.tiny import save_model_folder, sentiment_rows, tiny_llama, write_jsonl
from tests.toys import TinyNetwork
from tests.workspace import LORA, MEZO, Workspace
from vamo_ft.core.runtime import LocalRuntime

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds, of a machine that does much else


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    *arguments: str, cwd: Path, count: int = 2, last_cwd: Path | None = None, last: tuple[str, ...] = ()
) -> list["subprocess.Popen[str]"]:
    """`python -m ...` as the processes of one run, as a launcher starts them.

    Args:
        last_cwd: where the last one starts instead.
        last: further arguments of the last one.
    """
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments, *(last if rank == count - 1 else ())],
            cwd=(rank == count - 1 and last_cwd) or cwd,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: "list[subprocess.Popen[str]]") -> tuple[list[int], list[str]]:
    """Exit codes, and what stands in the standard error of each."""
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    return [process.returncode for process in processes], errors


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Tensor]], list[str]]:
    folder = tmp_path_factory.mktemp("replicas")
    codes, errors = finish(start("tests.replicas", str(folder), cwd=ROOT))
    assert codes == [0, 0], errors
    return (
        [load_file(folder / f"{rank}.safetensors") for rank in range(2)],
        [(folder / f"{rank}.txt").read_text() for rank in range(2)],
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return cases(LocalRuntime())


def test_processes_hold_the_same_bits(replicas: Any) -> None:
    (first, second), _ = replicas
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert torch.equal(first["prepared"], prepared(LocalRuntime(), rank=0))  # the first one's values, in both


@pytest.mark.parametrize("method", [*METHODS, "evaluation"])
def test_two_processes_do_what_one_does(method: str, replicas: Any, alone: dict[str, Tensor]) -> None:
    (first, _), _ = replicas
    names = [name for name in alone if name.partition(".")[0] == method]
    assert names
    for name in names:
        # A rounding of the losses counts 1 / eps times in a difference.
        torch.testing.assert_close(first[name], alone[name], rtol=1e-9, atol=1e-10)


def test_probes_and_snapshots_exchange_numbers_of_samples_and_gradients_go_once(replicas: Any) -> None:
    """However many parameters there are: one number for each sample and probe, and its loss."""
    (first, _), _ = replicas
    probes, counts_of_work = 2, 7
    losses, parameters = BATCH, sum(p.numel() for p in TinyNetwork(WIDTH).parameters())
    marks = 2 * SAMPLES  # weights of samples, and which are scored
    expected = {
        "sgd": [0, parameters + losses],
        "mezo": [0, BATCH * probes + losses],
        "mezo_bcd": [0, BATCH * probes + losses],
        "vamo": [SAMPLES * probes + marks + counts_of_work, parameters + losses],
    }
    assert {name: first[f"exchanged.{name}"].tolist() for name in expected} == expected


def test_a_stop_in_a_snapshot_changes_nothing(replicas: Any) -> None:
    (first, _), _ = replicas
    for method in ("vamo", "svrg", "zo_svrg", "vamo_literal"):
        for name in (name for name in first if name.startswith(f"{method}.stopped.")):
            torch.testing.assert_close(first[name], first[name.replace("stopped", "4")], rtol=1e-9, atol=1e-10)


def test_a_difference_in_one_bit_is_found_by_both(replicas: Any) -> None:
    (first, _), (said, same) = replicas
    assert "step 4: the processes do not hold the same parameters any more (1 of 2 tensors differ" in said
    assert "layer.weight" in said
    assert said == same
    assert first["flags"].tolist() == [True, False, True]


def test_a_tensor_without_a_gradient_is_told_by_all_in_the_same_words(replicas: Any) -> None:
    _, (said, same) = replicas
    expected = unreached(LocalRuntime())
    assert expected == (
        "model.freeze: the loss does not depend on 2 of the 4 trained tensors, such as spare.bias; they learn nothing, "
        "so leave them out: add spare.*"
    )
    assert said.splitlines()[1] == same.splitlines()[1] == expected


def test_a_wrong_configuration_is_told_once(workspace: Workspace) -> None:
    workspace.configure({"training": {"stepz": 6}})
    codes, errors = finish(start("vamo_ft", "train", "config.yaml", cwd=workspace.root))
    assert codes == [2, 2], errors
    assert errors[0] == "error: config.yaml:25: training.stepz: unknown key. Did you mean 'steps'?\n"
    assert errors[1] == ""


def test_a_process_with_other_settings_is_refused(workspace: Workspace) -> None:
    workspace.configure(MEZO)
    changed = ("--set", "training.batch_size=5", "--set", "run.seed=4")
    codes, errors = finish(start("vamo_ft", "train", "config.yaml", cwd=workspace.root, last=changed))
    assert codes == [2, 2], errors
    assert errors[0].splitlines()[-1] == (
        f"error: process 1: on {socket.gethostname()}: started with other settings than the first process (run.seed: "
        "3 -> 4; training.batch_size: 6 -> 5); start all of them with the same file and options"
    )
    assert errors[1] == ""


def test_the_first_process_decides_about_the_cache_and_about_changes(workspace: Workspace) -> None:
    """Another one with a choice of its own would wait where nobody comes."""
    workspace.configure({**MEZO, "training": {"steps": 2}})
    last = ("--no-cache", "--allow-changes")
    codes, errors = finish(start("vamo_ft", "train", "config.yaml", cwd=workspace.root, last=last))
    assert codes == [0, 0], errors


def test_a_machine_with_other_files_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    """Which shares the run directory, and has data and model of its own."""
    workspace.configure({"model": {"adapter": LORA}})
    other = Workspace(tmp_path / "other")
    other.configure({"model": {"adapter": LORA}})
    write_jsonl(other.root / "eval.jsonl", sentiment_rows(8))
    save_model_folder(other.root / "model", tiny_llama(seed=9))
    workspace.directory().mkdir(parents=True)
    (other.root / "runs").symlink_to(workspace.root / "runs")
    codes, errors = finish(start("vamo_ft", "train", "config.yaml", cwd=workspace.root, last_cwd=other.root))
    assert codes == [2, 2], errors
    assert errors[0].splitlines()[-1] == (
        f"error: process 1: model.path and data.evaluation: on {socket.gethostname()} the files are not those that the "
        "first process has read; give all machines of the run the same"
    )
    assert errors[1] == ""


ENDLESS = {
    **MEZO,
    "training": {"steps": 100000, "batch_size": 5},
    "evaluation": {"every": "100000 steps"},
    "checkpoint": {"every": "2 steps"},
    "logging": {"every": "1 steps", "report": False},
}


def started_run(
    workspace: Workspace, config: dict[str, Any], *, module: str = "vamo_ft", count: int = 2
) -> list["subprocess.Popen[str]"]:
    """Processes that have made three steps."""
    workspace.configure(config)
    processes = start(module, "train", "config.yaml", cwd=workspace.root, count=count)
    main = processes[0].stderr
    assert main is not None
    for line in main:
        if line.startswith("step 3 "):
            break
    return processes


def status(workspace: Workspace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workspace.directory() / "status.json").read_text())
    return found


def test_a_signal_to_one_process_stops_both_and_one_goes_on(workspace: Workspace) -> None:
    processes = started_run(workspace, ENDLESS)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = finish(processes)
    assert codes == [75, 75], errors
    assert "by a signal to another process; to go on, train tiny again" in errors[0]
    assert errors[1] == ""
    assert (status(workspace)["state"], status(workspace)["exit_code"]) == ("stopped", 75)
    done = workspace.metrics()[-1]["step"]
    assert workspace.train("--set", f"training.steps={done + 2}") == 0
    assert [line["step"] for line in workspace.metrics() if "loss" in line] == list(range(1, done + 3))


def test_a_process_that_is_killed_ends_the_other(workspace: Workspace) -> None:
    processes = started_run(workspace, {**ENDLESS, "method": {"name": "adamw"}, "optimizer": {"learning_rate": 0.01}})
    processes[1].kill()
    codes, errors = finish(processes)
    assert codes == [1, -9], errors
    assert "error: another process of the run was lost" in errors[0]
    assert "its last checkpoint is" in errors[0]
    assert "Traceback" not in errors[0]
    assert status(workspace)["state"] == "failed"
    step = int(sorted(path.name for path in (workspace.directory() / "checkpoints").iterdir())[-1].split("-")[1])
    assert workspace.train("--set", f"training.steps={step + 1}") == 0


def test_the_others_say_that_the_main_process_is_lost(workspace: Workspace) -> None:
    processes = started_run(workspace, ENDLESS)
    processes[0].kill()
    codes, errors = finish(processes)
    assert codes == [-9, 1], errors
    assert errors[1].splitlines()[-1].startswith("error: another process of the run was lost (killed, out of memory on")
    assert "Traceback" not in errors[1]
    assert workspace.train("--set", "training.steps=5") == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_gives_no_sign_of_life_is_not_waited_for(lost: int, workspace: Workspace) -> None:
    """One that is stopped, as a machine without its network, closes no connection; the first one holds the store."""
    processes = started_run(workspace, ENDLESS, module="tests.silent", count=3)
    processes[lost].send_signal(signal.SIGSTOP)
    left = [process for rank, process in enumerate(processes) if rank != lost]
    try:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in left]
    finally:
        for process in processes:
            process.kill()
    finish(processes)
    assert [process.returncode for process in left] == [1, 1], errors
    error = "".join(errors)
    said = ("the launcher, in whose store the processes met, gave no answer", "process 1 of the run gave no sign of")[
        lost
    ]
    assert f"error: {said}" in error
    assert "to go on, train tiny again with the same settings (after --fresh: with --set run.name=tiny" in error
    assert "Traceback" not in error


def test_a_divergence_ends_both_with_one_message(workspace: Workspace) -> None:
    workspace.configure(
        {"method": {"name": "sgd"}, "optimizer": {"learning_rate": 1e30}, "training": {"batch_size": 5}}
    )
    codes, errors = finish(start("vamo_ft", "train", "config.yaml", cwd=workspace.root))
    assert codes == [3, 3], errors
    assert errors[0].count("the update was not made") == 1
    assert errors[1] == ""
