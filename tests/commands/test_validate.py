from pathlib import Path

import pytest

from tests.config.examples import VALID, load_text
from vamo_ft.commands.validate import config_warnings, validate
from vamo_ft.config.load import resolved_values


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.jsonl").touch()
    loaded = load_text(VALID)
    validate(Path("config.yaml"), overrides=["method.probes=4", "method.directions.distribution=gaussian"])
    printed = capsys.readouterr()
    *listing, last = printed.out.splitlines()
    assert last == "config.yaml is valid"
    assert len(listing) == len(resolved_values(loaded.config))
    rows = {key: (value.strip(), source) for key, value, source in (_split(line) for line in listing)}
    assert rows["method.probes"] == ("4", "--set")
    assert rows["optimizer.learning_rate"] == ("0.001", "config.yaml:13")
    assert rows["optimizer.betas"] == ("[0.9, 0.999]", "default")
    assert rows["method.snapshot.every"] == ("1 epoch", "default")
    assert rows["model.adapter"] == ("null", "default")
    assert len({line.index("#") for line in listing}) == 1
    assert printed.err == ""


def _split(line: str) -> tuple[str, str, str]:
    key, rest = line.split("  ", 1)
    value, source = rest.rsplit("  # ", 1)
    return key, value, source


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        ([], []),
        (["evaluation.every=5 steps"], ["evaluation.every: has no effect without data.evaluation"]),
        (["schedule.warmup_steps=10"], ["schedule.warmup_steps: the run's 10 steps end within the warm-up"]),
        (["schedule.warmup_steps=9"], []),
        (
            ["model.path=./nothing", "data.train.path=org/data", "data.evaluation.path=gone.csv"],
            [
                "model.path: ./nothing does not exist (relative paths start in the working directory)",
                "data.evaluation.path: gone.csv does not exist (relative paths start in the working directory)",
            ],
        ),
    ],
)
def test_warnings(overrides: list[str], warnings: list[str]) -> None:
    Path("train.jsonl").touch()
    assert list(config_warnings(load_text(VALID, *overrides).config)) == warnings


def test_warnings_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    load_text(VALID)
    validate(Path("config.yaml"), overrides=[])
    assert capsys.readouterr().err == (
        "warning: data.train.path: train.jsonl does not exist (relative paths start in the working directory)\n"
    )
