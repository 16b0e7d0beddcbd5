"""What starts a run on machines that are taken away: after which exit codes again, and who hands signals on."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLOUD = ROOT / "configs" / "cloud"


def write_command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def srun(*, tasks: int, task: int = 0, place: int = 0) -> str:
    """That ends all tasks a minute after the first one did."""
    numbers = f"SLURM_STEP_NUM_TASKS={tasks} SLURM_PROCID={task} SLURM_LOCALID={place}"
    return f'[[ $1 == --wait=60 ]] || exit 9\nshift\nexport {numbers}\nexec "$@"'


@pytest.fixture
def batch_job(tmp_path: Path) -> Path:
    """A folder with an `srun` that runs what it is given and an `scontrol` that notes what it is to queue again."""
    write_command(tmp_path, "srun", srun(tasks=1))
    write_command(
        tmp_path,
        "scontrol",
        '[[ "$*" != "show hostnames n[4-5]" ]] || { echo n4; echo n5; exit; }; echo "$*" >> requeued',
    )
    return tmp_path


def started_job(folder: Path) -> "subprocess.Popen[str]":
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "10017", "SLURM_JOB_NODELIST": "n[4-5]"}
    return subprocess.Popen(
        ["bash", str(CLOUD / "slurm.sbatch"), "config.yaml", "--set", "training.steps=9"],
        cwd=folder,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_batch_job_hands_the_signal_on_and_queues_itself_again(batch_job: Path) -> None:
    """The run is given the time that its checkpoint takes, also when there are further signals."""
    write_command(
        batch_job,
        "vamo-ft",
        "trap 'stop=yes' TERM\necho \"$*\"\nuntil [[ $stop && -e saved ]]; do sleep 0.05; done\nexit 75",
    )
    with started_job(batch_job) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "train config.yaml --set training.steps=9\n"
        for _ in range(2):
            job.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert not (batch_job / "requeued").exists()
        (batch_job / "saved").touch()
    assert job.returncode == 75
    assert (batch_job / "requeued").read_text() == "requeue 10017\n"


@pytest.mark.parametrize(("tasks", "said"), [(1, "  "), (4, "4 3 1")])
def test_every_task_of_a_batch_job_is_one_process_of_the_run(tasks: int, said: str, batch_job: Path) -> None:
    """Which knows the others as a launcher would tell it, and connects to nobody where it is alone."""
    write_command(batch_job, "srun", srun(tasks=tasks, task=3, place=1))
    write_command(batch_job, "vamo-ft", 'echo "$WORLD_SIZE $RANK $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*"; exit 75')
    with started_job(batch_job) as job:
        assert job.stdout is not None
        assert job.stdout.read() == f"{said} n4 20017 train config.yaml --set training.steps=9\n"
    assert job.returncode == 75
    assert (batch_job / "requeued").read_text() == "requeue 10017\n"


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4])
def test_a_batch_job_that_did_not_stop_is_not_queued_again(code: int, batch_job: Path) -> None:
    write_command(batch_job, "vamo-ft", f"exit {code}")
    with started_job(batch_job) as job:
        pass
    assert job.returncode == code
    assert not (batch_job / "requeued").exists()


def test_the_batch_job_asks_for_the_signal_in_time() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", (CLOUD / "slurm.sbatch").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append"} <= set(options)
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"} <= set(options)  # what a command line may change
    assert os.access(CLOUD / "slurm.sbatch", os.X_OK)


def test_the_service_goes_on_after_75_and_not_after_a_failure_that_would_come_again() -> None:
    text = (CLOUD / "vamo-ft.service").read_text(encoding="utf-8")
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    assert settings["Restart"] == "on-failure"
    assert settings["RestartPreventExitStatus"].split() == ["2", "3", "4"]
    assert settings["KillSignal"] == "SIGTERM"
    assert settings["ExecStart"].split()[1:] == ["train", "config.yaml"]
    assert settings["WantedBy"] == "multi-user.target"  # also after the machine came back


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_service(tmp_path: Path) -> None:
    unit = tmp_path / "vamo-ft.service"
    text = (CLOUD / "vamo-ft.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/vamo-ft/bin/vamo-ft", "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_composed_container_is_the_image_of_the_repository() -> None:
    composed: dict[str, Any] = yaml.safe_load((CLOUD / "compose.yaml").read_text(encoding="utf-8"))
    service = composed["services"]["train"]
    assert (CLOUD / service["build"] / "Dockerfile").is_file()
    assert service["command"][0] == "train"
    assert service["restart"] == "on-failure:5"  # 0 is no failure, and what fails in the same way ends
    assert service["stop_grace_period"] == "2m"
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    targets = [volume.rsplit(":", 1)[1] for volume in service["volumes"]]
    assert targets == [re.findall(r"^WORKDIR (.+)$", dockerfile, re.MULTILINE)[-1], "/cache"]
    assert set(composed["volumes"]) == {"cache"}
    assert "entrypoint" not in service and "init" not in service  # tini is the image's own
