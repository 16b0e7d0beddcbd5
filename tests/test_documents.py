"""The README and the shipped configurations stay true."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from vamo_ft.arguments import app
from vamo_ft.commands.methods import METHODS
from vamo_ft.config.load import load_config, load_experiment

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "cloud"]


def shell_lines() -> list[str]:
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(vamo-ft|scripts/)", line)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    (load_experiment if path.parent.name == "paper" else load_config)(path)


def test_the_readme_shows_commands() -> None:
    assert len(shell_lines()) >= 6


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_in_the_readme_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0].startswith("scripts/"):
        assert (ROOT / words[0]).is_file()
        return
    command = next(word for word in words[1:] if not word.startswith("-"))
    assert command in COMMANDS
    known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known | {"--debug"}


@pytest.mark.parametrize("summary", METHODS, ids=lambda summary: summary.name)
def test_the_readme_shows_what_each_method_costs(summary) -> None:
    cells = [summary.name, summary.forward, summary.backward, summary.snapshot, summary.memory]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in README.splitlines() if "|" in line]
    assert any(row[: len(cells)] == cells for row in rows), f"README has no row {cells}"
