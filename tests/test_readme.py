"""Every command of the README runs, in its order and in one folder, with a tiny model in the place of the Hub's."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from scripts.paper_figures import __main__ as paper
from scripts.paper_figures import language_model
from tests.test_documents import COMMANDS, README, ROOT
from tests.tiny import sentiment_rows, write_jsonl
from tests.workspace import LORA, Workspace, base_config, merged
from vamo_ft.cli import run
from vamo_ft.config.load import load_config
from vamo_ft.config.yaml_text import parse_yaml
from vamo_ft.models.export import quietly

# Hub ids and what else the text presupposes; a local folder of that name is what a command takes first.
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "data/quickstart/model")
ROWS = {
    "dev.jsonl": 12,
    "stanfordnlp/sst2/train.jsonl": 40,
    "stanfordnlp/sst2/validation.jsonl": 12,
    "data/sst2/train.jsonl": 20,
    "data/sst2/dev.jsonl": 12,
}

# What a command is given besides, so that it takes a second: of an option that is given twice the last one holds.
SMALLER = {
    "vamo-ft train configs/sst2_adamw.yaml": "--set training.steps=4",
    "vamo-ft train my.yaml --set training.steps=500": "--set training.steps=4",
    "vamo-ft train reviews.yaml --set run.name=reviews": "--set training.steps=2",
    "vamo-ft train configs/sst2_vamo.yaml": "--set training.steps=4",
    "vamo-ft train configs/sst2_mezo.yaml": "--set training.steps=4",
    "vamo-ft plan my.yaml": "--set training.steps=40",
    "vamo-ft plan my.yaml --gpu rtx4090": "--set training.steps=40",
    "vamo-ft plan my.yaml --gpu h100-80gb --methods adamw,mezo": "--set training.steps=40",
    "vamo-ft plan my.yaml --tokens-per-second 5000": "--set training.steps=40",
    "vamo-ft plan my.yaml --measure": "--set training.steps=40",
    "vamo-ft diagnose my.yaml --steps 64 --samples 64 --batches 32": "--steps 2 --samples 4 --batches 8",
    "vamo-ft train my.yaml --set training.steps=800": "--set training.steps=6",
    "vamo-ft train my.yaml --set training.steps=800 --fresh": "--set training.steps=6",
    "vamo-ft export runs/sst2-mezo earlier --from-seedlog model --steps 500": "--steps 2",
    'vamo-ft compare my.yaml --methods adamw,vamo,mezo --budget "20000 evaluations" --seeds 5': (
        "--budget '600 evaluations' --seeds 2 --set compare.points=2 --set logging.report=false "
        "--learning-rates adamw=1e-3 --learning-rates vamo=1e-3 --learning-rates mezo=1e-4"
    ),
    "vamo-ft compare configs/sst2_compare.yaml": (
        "--budget '140 evaluations' --seeds 2 --set compare.points=2 --learning-rates sgd=1 "
        "--learning-rates adamw=1e-3 --learning-rates vamo=1e-3 --learning-rates mezo=1e-4 "
        "--learning-rates mezo_bcd=1e-3"
    ),
    "scripts/paper --experiments sst2 --set data.train.path=train.jsonl --set data.evaluation.path=dev.jsonl": (
        "--quick"
    ),
}

# Commands that do not run here, and the tests that see to them.
ELSEWHERE = {
    "scripts/quickstart": "tests/test_scripts.py::test_quickstart_prepares_trains_and_tells_what_is_next",
    "vamo-ft evaluate runs/vamo-lora --tasks arc_easy,hellaswag --limit 200": (
        "tests/test_harness.py::test_tasks_on_a_run"
    ),
    "vamo-ft export runs/vamo-lora adapter --push-to-hub me/my-adapter --private": (
        "tests/test_export_files.py::test_an_upload"
    ),
    "scripts/paper": "tests/studies/test_paper.py::test_results_become_a_picture_and_numbers",
    "scripts/paper --quick": "tests/test_scripts.py::test_paper_hands_its_arguments_on",
    "docker build -t vamo-ft .": "tests/test_dockerfile.py::test_every_copied_file_exists_and_reaches_the_build",
    'docker run --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/workspace" -v vamo-ft-cache:/cache '
    "vamo-ft train config.yaml": "tests/test_dockerfile.py::test_the_process_is_not_root_and_gets_its_signals",
    "pip install torch": "tests/test_scripts.py::test_setup_installs_torch_first_and_does_nothing_the_second_time",
    "pip install .": "tests/test_dockerfile.py::test_it_installs_as_the_scripts_do",
    "scripts/setup": "tests/test_scripts.py::test_setup_installs_torch_first_and_does_nothing_the_second_time",
    "scripts/check": "tests/test_scripts.py::test_ci_runs_the_scripts",
    "scripts/test": "tests/test_scripts.py::test_test_hands_its_arguments_to_pytest",
    "scripts/test tests/estimators -k vamo": "tests/test_scripts.py::test_test_hands_its_arguments_to_pytest",
    "accelerate launch --multi_gpu --num_processes 4 -m vamo_ft train my.yaml": (
        "tests/test_launchers.py::test_a_run_of_one_process_goes_on_in_four_is_interrupted_and_ends_in_two"
    ),
    "torchrun --nproc-per-node 4 -m vamo_ft train my.yaml": (
        "tests/test_launchers.py::test_a_run_of_one_process_goes_on_in_four_is_interrupted_and_ends_in_two"
    ),
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint box1:29500 -m vamo_ft train my.yaml": (
        "tests/test_launchers.py::test_a_signal_to_one_box_stops_both"
    ),
    "scripts/plan_check": "tests/test_scripts.py::test_plan_check_hands_its_arguments_on",
    "scripts/test -m gpu": "tests/test_scripts.py::test_test_hands_its_arguments_to_pytest",
    "VAMO_FT_TEST_IMAGE=1 scripts/test tests/test_image.py": (
        "tests/test_image.py::test_a_container_says_what_it_can_do"
    ),
    "scripts/bench --device cuda": "tests/test_bench.py::test_a_device_that_is_not_there_is_one_line",
    "scripts/bench": "tests/test_bench.py::test_every_case_reports",
    "scripts/torture": "tests/test_torture.py::test_five_rounds_lose_nothing",
}


def shell_commands() -> list[str]:
    """The commands of the shell blocks, in their order, without comments."""
    blocks = re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip() for line in lines]
    return [command for command in commands if command]


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture
def folder(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """What the text presupposes: the checkout's configurations, models, data sets and a file of one's own."""
    shutil.copytree(ROOT / "configs", workspace.root / "configs")
    for name in MODELS:
        shutil.copytree(workspace.root / "model", workspace.root / name)
    for name, count in ROWS.items():
        path = workspace.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, sentiment_rows(count))
    rows = "".join(f"{row['sentence']},{row['label']}\n" for row in sentiment_rows(12))
    (workspace.root / "reviews.csv").write_text(f"sentence,label\n{rows}")
    monkeypatch.setattr(language_model, "subprocess", SimpleNamespace(run=run_python))
    return workspace


def run_python(command: Sequence[str]) -> SimpleNamespace:
    """`python -m vamo_ft ...` without a process of its own."""
    return SimpleNamespace(returncode=run(command[3:]))


def run_paper(arguments: Sequence[str]) -> int:
    paper.main(arguments)  # exits with the code of what fails
    return 0


RUN_HERE: Mapping[str, Callable[[Sequence[str]], int]] = {"vamo-ft": run, "scripts/paper": run_paper}


def execute(command: str) -> int:
    program, *arguments = shlex.split(f"{command} {SMALLER.get(command, '')}")
    return RUN_HERE[program](arguments)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs(folder: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    for command in shell_commands():
        if command not in ELSEWHERE:
            code = execute(command)
            assert code == 0, f"{command}\n{capsys.readouterr().err}"
    check_results(folder.root)


def check_results(root: Path) -> None:
    """What the text says that the commands leave behind."""
    finished = {path.parent.name: json.loads(path.read_text()) for path in (root / "runs").glob("*/status.json")}
    assert {name: (status["state"], status["step"]) for name, status in finished.items()} == {
        "sst2-adamw": ("finished", 4),
        "sst2-vamo": ("finished", 4),
        "sst2-mezo": ("finished", 4),
        "vamo-lora": ("finished", 6),
        "vamo-lora-2": ("finished", 6),
        "reviews": ("finished", 2),
    }
    for name, dtype in (("out", torch.float32), ("merged", torch.bfloat16)):
        with quietly():
            assert AutoModelForCausalLM.from_pretrained(root / name).dtype == dtype
    for name in ("rebuilt", "earlier"):
        assert (root / name / "adapter_model.safetensors").exists()
    assert len((root / "out.jsonl").read_text().splitlines()) == ROWS["stanfordnlp/sst2/validation.jsonl"]
    assert all((root / name).exists() for name in ("report.html", "both.html", "runs/sst2-vamo/report.html"))
    assert list((root / "pictures").glob("*.png"))
    for folder in ("diagnose", "compare"):
        assert (root / f"runs/vamo-lora-{folder}/{folder}.json").exists()
        assert (root / f"runs/vamo-lora-{folder}/{folder}.png").exists()
    table = (root / "runs/sst2-compare/compare.md").read_text()
    assert all(f"| {method} |" in table for method in ("sgd", "adamw", "vamo", "mezo", "mezo_bcd"))
    assert (root / "build/paper/sst2.png").exists()


@pytest.mark.parametrize("command", shell_commands())
def test_every_command_is_seen_to(command: str) -> None:
    assert command in ELSEWHERE or shlex.split(command)[0] in RUN_HERE, "name a test in ELSEWHERE"


@pytest.mark.parametrize("command", [*ELSEWHERE, *SMALLER])
def test_no_entry_is_stale(command: str) -> None:
    assert command in shell_commands()


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_a_test_elsewhere_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?<!`)`vamo-ft ([^`]+)`(?!`)", README))))
def test_a_command_within_the_text_exists(command: str) -> None:
    check_exists(shlex.split(re.sub(r"\s+", " ", command)))


def check_exists(arguments: Sequence[str]) -> None:
    name = arguments[0]
    assert name in COMMANDS
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= known


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL))
def test_a_configuration_in_the_text_is_valid(block: str, tmp_path: Path) -> None:
    others = merged(base_config(), {"model": {"adapter": LORA}, "evaluation": {"metrics": ["loss"]}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**others, **parse_yaml(block).values}, sort_keys=False), encoding="utf-8")
    load_config(path)


def test_links_within_the_text_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    headings = {anchor(line.lstrip("# ")) for line in prose.splitlines() if line.startswith("#")}
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert {target[1:] for target in targets if target.startswith("#")} <= headings
    files = [target for target in targets if not target.startswith(("#", "https://"))]
    assert files
    assert all((ROOT / file).is_file() for file in files)
    contents = prose.split("## Contents")[1].split("\n## ")[0]
    sections = {anchor(line[3:]) for line in prose.splitlines() if line.startswith("## ")} - {"contents"}
    assert set(re.findall(r"\]\(#([^)]+)\)", contents)) == sections
