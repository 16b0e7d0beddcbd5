"""Runs on several data sets, and runs that take their tokens from the cache."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.tiny import byte_tokenizer, sentiment_rows, write_jsonl
from tests.workspace import Workspace
from vamo_ft.assemble import Surroundings
from vamo_ft.assemble.pilot import run_pilot
from vamo_ft.cli import run
from vamo_ft.config.data import DataConfig
from vamo_ft.config.load import load_config
from vamo_ft.config.yaml_text import parse_yaml
from vamo_ft.core.types import Batch, LossTerms
from vamo_ft.data.loading import load_samples
from vamo_ft.data.mixture import MixedOrder, Mixture
from vamo_ft.data.places import sample_places
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.training.progress import SilentProgress

MIXED: dict[str, Any] = {
    "data": {
        "train": [
            {"path": "train.jsonl", "weight": 2},
            {"path": "other.csv", "weight": 1, "columns": {"sentence": "text", "label": "class"}, "split": "train[1:]"},
        ]
    }
}
ORDER = MixedOrder(Mixture((20, 7), (2.0, 1.0)), batch_size=6, seed=3)


@pytest.fixture
def mixed(workspace: Workspace) -> Workspace:
    lines = ["text,class", *(f"{row['sentence']},{row['label']}" for row in sentiment_rows(8))]
    (workspace.root / "other.csv").write_text("\n".join(lines) + "\n")
    return workspace


METHODS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "vamo_subset": {
        "method": {"name": "vamo", "probes": 2, "eps": 0.001, "snapshot": {"every": "1 steps", "set": {"subset": 16}}},
        "training": {"batch_size": 2},
    },
    "mezo": {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_on_a_mixture_is_the_run(mixed: Workspace, name: str) -> None:
    changes = {**MIXED, **METHODS[name]}
    mixed.configure(changes | {"run": {"name": "whole", "seed": 3}}, file="whole.yaml")
    assert mixed.train(config="whole.yaml") == 0
    for length in ("training.steps=6", "training.steps=8"):
        assert mixed.train("--set", "run.name=parts", "--set", length, config="whole.yaml") == 0
    assert mixed.weights("parts") == mixed.weights("whole")
    lines = [line for line in mixed.metrics("whole") if "loss" in line and line["step"] > 6]
    assert lines
    assert all(line in mixed.metrics("parts") for line in lines)


def test_the_epoch_of_a_mixture_is_the_one_it_draws(mixed: Workspace) -> None:
    assert ORDER.samples_per_epoch == 30
    mixed.configure({**MIXED, "training": {"steps": None, "epochs": 2, "batch_size": 6}})
    assert mixed.train() == 0
    assert mixed.metrics()[-1]["step"] == 10
    assert [line["epoch"] for line in mixed.metrics() if "epoch" in line][-1] == pytest.approx(2.0)
    log = (mixed.directory() / "log.txt").read_text()
    assert "data.train: 2 data sets of 20, 7 samples; an epoch draws 20, 10 of them" in log


def test_a_divergence_names_rows_of_every_data_set(
    mixed: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = VerbaliserClassification.terms
    step = next(step for step in range(8) if len({index < 20 for index in ORDER.step_indices(step)}) == 2)

    def terms(self: VerbaliserClassification, batch: Batch) -> LossTerms:
        found = original(self, batch)
        bad = batch.indices == ORDER.step_indices(step)
        return LossTerms(found.total * torch.nan, found.count) if bad else found

    monkeypatch.setattr(VerbaliserClassification, "terms", terms)
    mixed.configure(MIXED)
    assert mixed.train() == 3
    message = capsys.readouterr().err
    for index in ORDER.step_indices(step):
        place = f"train.jsonl:{index + 1}" if index < 20 else f"other.csv, row {index - 20 + 2}"
        assert f"{index} ({place})" in message


def test_other_weights_are_another_run(mixed: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    mixed.configure(MIXED)
    assert mixed.train("--set", "training.steps=4") == 0
    capsys.readouterr()
    assert mixed.train("--set", "data.train.0.weight=3") == 2
    assert "data.train.0.weight: 2.0 -> 3.0" in capsys.readouterr().err
    (mixed.root / "other.csv").write_text("text,class\n" + "bad,0\n" * 8)
    assert mixed.train() == 2
    assert "data.train: the samples differ from those" in capsys.readouterr().err


def test_a_list_without_weights_is_the_concatenation(mixed: Workspace) -> None:
    parts = [write_jsonl(mixed.root / f"{number}.jsonl", sentiment_rows(20)[number::2]) for number in range(2)]
    write_jsonl(mixed.root / "both.jsonl", sentiment_rows(20)[::2] + sentiment_rows(20)[1::2])
    mixed.configure({"data": {"train": {"path": "both.jsonl"}}, "run": {"name": "one"}}, file="one.yaml")
    mixed.configure(
        {"data": {"train": [{"path": part.name} for part in parts]}, "run": {"name": "two"}}, file="two.yaml"
    )
    assert mixed.train(config="one.yaml") == mixed.train(config="two.yaml") == 0
    assert mixed.weights("one") == mixed.weights("two")


def test_every_data_set_may_have_a_format(mixed: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classification beside prompts with completions: what is learnt of each are its own tokens."""
    write_jsonl(mixed.root / "pairs.jsonl", [{"q": "one", "a": "two"}])
    pairs = {"type": "prompt_completion", "prompt": "{q}", "completion": "{a}"}
    found: list[str] = []
    original = TrainingSamples.__init__

    def noted(self: TrainingSamples, data: Any, **keys: Any) -> None:
        decode = byte_tokenizer().decode
        found.extend(decode(data[i].prompt_ids) + "|" + decode(data[i].completion_ids) for i in range(len(data)))
        original(self, data, **keys)

    monkeypatch.setattr(TrainingSamples, "__init__", noted)
    mixed.configure(
        {"data": {"train": [{"path": "train.jsonl", "limit": 1}, {"path": "pairs.jsonl", "format": pairs}]}}
    )
    assert mixed.train() == 0
    assert found == ["bad It was| bad", "one|two</s>"]


def test_packed_samples_of_several_data_sets_know_their_rows(mixed: Workspace) -> None:
    """Rows are packed within their data set, so that a weight is the share of one."""
    pairs = {"type": "prompt_completion", "prompt": "{sentence}", "completion": " {label}"}
    config = DataConfig(
        train=[
            {"path": "train.jsonl", "limit": 6, "weight": 1},
            {"path": "other.csv", "columns": {"sentence": "text", "label": "class"}, "split": "train[2:]", "weight": 3},
        ],
        format=pairs,
        packing=True,
        max_length=60,
    )
    source, _ = load_samples(
        config, byte_tokenizer(), task="causal_lm", batch_size=2, seed=0, position_ids=True, offline=True
    )
    first, second = source.mixture.sizes
    assert 1 < first < 6
    origins = [source.origin(index) for index in range(source.num_samples)]
    assert [number for number, _ in origins] == [0] * first + [1] * second
    for number, count in enumerate((6, 6)):
        assert sorted(row for owner, rows in origins if owner == number for row in rows) == list(range(count))
    places = sample_places(config.training_sets, origins)
    assert places[0][0] == "train.jsonl:1"
    assert places[first][0] == "other.csv, row 3"


def test_keys_of_a_format_look_at_every_data_sets_own() -> None:
    words = {"type": "classification", "template": "{a}", "labels": {"0": "b", "1": "c"}}
    with pytest.raises(ValidationError, match="packing: a classification"):
        DataConfig(train=[{"path": "a"}, {"path": "b", "format": words}], format={"type": "text"}, packing=True)
    with pytest.raises(ValidationError, match="chat_template: is used by"):
        DataConfig(train=[{"path": "a"}, {"path": "b"}], format={"type": "text"}, chat_template="x")
    chat = {"path": "b", "format": {"type": "chat"}}
    assert DataConfig(train=[{"path": "a"}, chat], format={"type": "text"}, chat_template="x").training_sets[1].format


def test_the_readmes_data_sets_are_valid() -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(data:\n.*?)```", readme, flags=re.DOTALL)
    config = DataConfig.model_validate(parse_yaml(block).values["data"])
    assert config.weights == (2.0, 1.0, 1.0)
    assert config.training_sets[2].streaming


REFUSED = [
    ({"model": {"task": "sequence_classification"}}, "data.train: a classifier head, and an objective of type metric"),
    (
        {"objective": {"type": "metric", "name": "accuracy"}, "method": {"name": "mezo"}},
        "data.train: a classifier head, and an objective of type metric",
    ),
    ({"data": {"evaluation": {"format": {"type": "prompt_completion"}}}}, "data.evaluation.format.type: must be that"),
    ({"data": {"train": [{"path": "a", "weight": 1}, {"path": "b"}]}}, "data.train: a weight for every data set, or"),
    (
        {"data": {"train": [{"path": "a", "max_samples": 1}]}},
        "max_samples: unknown key. It is called 'limit'",
    ),
    (
        {"data": {"train": {"path": "a", "weight": 2}}},
        "data.train.weight: unknown key. 'weight' is a key of data.train (a list)",
    ),
    ({"data": {"train": [{"path": "a", "streaming": True}]}}, "data.train.0.limit: needed with streaming: true"),
    ({"data": {"train": []}}, "data.train: names no data set"),
    ({"data": {"train": [3]}}, "data.train.0: must be a section with keys, not 3"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(
    mixed: Workspace, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    own = {"type": "classification", "template": "{sentence}", "labels": {0: " b", 1: " c"}}
    base = {"train": [{"path": "train.jsonl", "format": own}]}
    mixed.configure({**changes, "data": {**base, **changes.get("data", {})}})
    assert mixed.train() == 2
    assert message in capsys.readouterr().err


def test_a_preview_tells_what_a_mixture_draws(mixed: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    mixed.configure(MIXED)
    assert run(["preview", "config.yaml", "-n", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"sample {ORDER.step_indices(0)[0]}: ")
    assert "\n  2 data sets of 20, 7 samples; an epoch draws 20, 10 of them\n" in printed
    assert "  steps: 5.0 of 6 samples to an epoch; the run's 8 are 1.60 epochs\n" in printed


def test_a_preview_asks_for_no_more_steps_than_it_shows(
    mixed: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: set[int] = set()
    original = TrainingSamples.step_indices

    def step_indices(self: TrainingSamples, step: int) -> tuple[int, ...]:
        asked.add(step)
        return original(self, step)

    monkeypatch.setattr(TrainingSamples, "step_indices", step_indices)
    parts = [{"path": "train.jsonl", "weight": 1}, {"path": "eval.jsonl", "weight": 0.001}]  # an epoch of 9,009
    mixed.configure({"data": {"train": parts}})
    assert run(["preview", "config.yaml", "-n", "2"]) == 0
    assert max(asked) < 200
    assert "\n  2 data sets of 20, 9 samples; an epoch draws 9000, 9 of them\n" in capsys.readouterr().out


def test_a_pilot_takes_snapshots_when_the_run_does(mixed: Workspace) -> None:
    """Once an epoch of the mixture, which is longer than its samples are many."""
    vamo = {"name": "vamo", "probes": 1, "eps": 0.001, "snapshot": {"every": "1 epoch"}}
    mixed.configure({**MIXED, "method": vamo})
    config = load_config(Path("config.yaml")).config
    surroundings = Surroundings(SilentProgress(), lambda: False)
    pilot = run_pilot(config, surroundings, timed=False, by_layer=False, enough=lambda cost, ledger: False)
    assert [step for step in range(21) if pilot.cost(step).snapshot.forward_samples] == [0, 5, 10, 15, 20]


def test_without_a_cache_nothing_is_kept(mixed: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vamo_ft.commands.diagnose._draw", lambda *_, **keys: None)
    monkeypatch.setattr("vamo_ft.commands.compare.draw_comparison", lambda *_, **keys: None)
    cache = Path(os.environ["VAMO_FT_CACHE"])
    mixed.configure({"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}})
    assert run(["diagnose", "config.yaml", "--steps", "1", "--samples", "2", "--batches", "8", "--no-cache"]) == 0
    compared = ["--methods", "mezo", "--budget", "40 evaluations", "--seeds", "1"]
    assert run(["compare", "config.yaml", *compared, "--no-cache", "--learning-rates", "mezo=1e-4"]) == 0
    assert not list(cache.iterdir())


def test_validate_lists_every_data_set(mixed: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    mixed.configure(MIXED)
    assert run(["validate", "config.yaml", "--set", "data.train.1.limit=5", "--set", "data.train.0.path=gone.csv"]) == 0
    printed = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in printed.out.splitlines()}
    assert rows["data.train.0.path"] == ["gone.csv", "#", "--set"]
    assert rows["data.train.1.limit"] == ["5", "#", "--set"]
    assert rows["data.train.1.columns.sentence"][:3] == ["text", "#", "config.yaml:13"]
    assert rows["data.train.1.weight"][0] == "1.0"
    assert printed.err == (
        "warning: data.train.0.path: gone.csv does not exist (relative paths start in the working directory)\n"
    )


def test_tokens_from_the_cache_give_the_same_run(mixed: Workspace) -> None:
    cache = Path(os.environ["VAMO_FT_CACHE"])
    mixed.configure(MIXED)
    assert mixed.train("--no-cache", "--set", "run.name=none") == 0
    assert not list(cache.iterdir())
    assert "tokens:" not in (mixed.directory("none") / "log.txt").read_text()
    for name, told in (("first", "tokens: cached as "), ("second", "tokens: from cache ")):
        assert mixed.train("--set", f"run.name={name}") == 0
        assert (mixed.directory(name) / "log.txt").read_text().count(told) == 3  # two data sets, and the held-out one
    assert mixed.weights("none") == mixed.weights("first") == mixed.weights("second")
    assert mixed.metrics("none") == mixed.metrics("first") == mixed.metrics("second")


def test_another_data_set_is_evaluated_by_the_runs_columns(
    mixed: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"sentence": "text", "label": "class"}
    mixed.configure({"data": {"evaluation": {"path": "other.csv", "columns": columns}}})
    assert mixed.train("--set", "training.steps=1") == 0
    capsys.readouterr()
    assert run(["evaluate", "runs/tiny", "--no-cache"]) == 0
    first = capsys.readouterr().out
    assert run(["evaluate", "runs/tiny", "--data", "other.csv"]) == 0
    assert capsys.readouterr().out == first
