"""`vamo-ft compare` on the tiny model: equal budgets, honest choices, and going on where it stopped."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import sentiment_rows, write_jsonl
from tests.workspace import LORA, Workspace
from vamo_ft.cli import run
from vamo_ft.studies.paired import t_test_p
from vamo_ft.training.trainer import Trainer

TIMES = ("seconds", "step_seconds", "peak_memory_bytes", "time")
METHODS = {
    "adamw": {"learning_rates": [0.01]},
    "vamo": {"learning_rates": [0.01], "set": {"method": {"probes": 2, "snapshot": {"every": "3 steps"}}}},
    "vamo-mixed": {  # an epoch draws 60 of the mixture's 32 samples
        "learning_rates": [0.01],
        "set": {"method": {"name": "vamo", "probes": 2, "snapshot": {"every": "1 epoch"}}},
    },
    "mezo": {"learning_rates": [1e-4]},
    "mezo_bcd": {"learning_rates": [1e-4], "set": {"method.difference": "forward"}},
}


@pytest.fixture(autouse=True)
def _short_collections() -> Iterator[None]:
    """A comparison collects garbage before every run; what a test session has imported need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


def configured(workspace: Workspace, compare: dict[str, Any], **changes: Any) -> None:
    write_jsonl(workspace.root / "eval.jsonl", sentiment_rows(12))
    workspace.configure({"model": {"adapter": LORA}, "checkpoint": {"every": None}, "compare": compare, **changes})


def result(workspace: Workspace, folder: str = "runs/tiny-compare") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((workspace.root / folder / "compare.json").read_text())
    return content


def timeless(value: Any) -> Any:
    """Without what depends on the clock and the machine."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def spent(line: dict[str, Any], currency: str) -> float:
    counts = {"evaluations": "evals", "tokens": "tokens"}
    if currency in counts:
        return line[f"forward_{counts[currency]}"] + 2 * line[f"backward_{counts[currency]}"]
    return line[currency]


@pytest.mark.parametrize(
    ("currency", "amount", "methods"),
    [
        ("evaluations", 420, ["adamw", "vamo", "mezo", "mezo_bcd"]),
        ("evaluations", 480, ["vamo-mixed"]),
        ("tokens", 10_500, ["adamw", "vamo"]),
        ("flops", 2.5e8, ["vamo", "mezo_bcd"]),
    ],
)
def test_every_method_spends_the_same(workspace: Workspace, currency: str, amount: float, methods: list[str]) -> None:
    chosen = {method: METHODS[method] for method in methods}
    mixed = [{"path": "train.jsonl", "weight": 1}, {"path": "eval.jsonl", "weight": 2}]
    data = {"data": {"train": mixed}} if methods == ["vamo-mixed"] else {}
    compare = {"budget": f"{amount:g} {currency}", "seeds": 1, "points": 1, "methods": chosen}
    configured(workspace, compare, **data)
    assert run(["compare", "config.yaml"]) == 0
    content = result(workspace)
    assert [record["label"] for record in content["runs"]] == methods
    for record in content["runs"]:
        assert record["steps"] > 3 or currency == "flops", "a second snapshot is in the budget"
        name, steps = f"{record['label']}-lr{record['learning_rate']:g}-seed1", record["steps"]
        config = str(workspace.root / "runs" / "tiny-compare" / "runs" / name / "config.yaml")
        longer = [
            f"training.steps={steps + 1}",
            "logging.every=1 step",
            "data.evaluation=null",
            "run.output_dir=longer",
        ]
        alone = [word for setting in longer for word in ("--set", setting)]
        assert workspace.train(*alone, "--set", "evaluation.part=null", config=config) == 0
        text = (workspace.root / "longer" / name / "metrics.jsonl").read_text()
        spendings = [spent(json.loads(line), currency) for line in text.splitlines()]
        assert len(spendings) == steps + 1
        assert record["spent"] == spendings[steps - 1]
        plan = content["plans"][record["label"]]
        assert plan["steps"] == steps
        step = max(after - before for before, after in pairwise([0, *spendings]))  # with a snapshot, if it has one
        if currency == "evaluations":  # the same for any order of the samples
            assert record["spent"] == plan["expected"] <= amount < spendings[steps]
        else:
            assert plan["expected"] <= amount
            assert abs(record["spent"] - amount) <= step


def test_learning_rates_are_chosen_apart_from_what_is_reported(workspace: Workspace) -> None:
    compare = {
        "budget": "180 evaluations",
        "seeds": [4, 5],
        "tuning_seed": 7,
        "metric": "loss",
        "methods": {"adamw": {"learning_rates": [1e-4, 0.03, 1e30]}, "sgd": {"learning_rates": [0.1]}},
    }
    configured(workspace, compare)
    assert run(["compare", "config.yaml"]) == 0
    content = result(workspace)
    tuning = [record for record in content["runs"] if record["tuning"]]
    assert [(record["label"], record["learning_rate"], record["seed"]) for record in tuning] == [
        ("adamw", 1e-4, 7),
        ("adamw", 0.03, 7),
        ("adamw", 1e30, 7),
    ]
    assert [record["state"] for record in tuning] == ["finished", "finished", "diverged"]
    assert "not finite" in tuning[2]["message"] or "nan" in tuning[2]["message"]
    adamw, sgd = content["results"]["methods"]
    assert (adamw["learning_rate"], adamw["at_edge"], sgd["trials"]) == (0.03, False, [])
    assert [trial["value"] for trial in adamw["trials"]] == [
        tuning[0]["final"]["loss"],
        tuning[1]["final"]["loss"],
        None,
    ]
    runs = workspace.root / "runs" / "tiny-compare" / "runs"
    halves = {
        name: json.loads((runs / f"adamw-lr0.03-seed{seed}" / "scores.json").read_text())["indices"]
        for name, seed in (("tune", 7), ("test", 4), ("other", 5))
    }
    assert sorted(halves["tune"] + halves["test"]) == list(range(12))
    assert halves["test"] == halves["other"]
    assert len(halves["tune"]) == 6
    # the last evaluation within a run is the final model's
    for record in content["runs"]:
        if record["state"] == "finished":
            last = record["points"][-1]
            assert last["step"] == record["steps"]
            assert last["values"]["loss"] == pytest.approx(record["final"]["loss"], rel=1e-5)
    assert content["results"]["reference"] == "adamw"
    contest = sgd["contest"]
    assert contest["difference"]["value"] == pytest.approx(sgd["mean"]["value"] - adamw["mean"]["value"])
    values = [one - other for one, other in zip(sgd["values"], adamw["values"], strict=True)]
    assert (contest["t_p"], contest["signs_p"]) == (t_test_p(values), 0.5)
    assert contest["adjusted_p"] == max(contest["bootstrap_p"], contest["t_p"])
    assert contest["verdict"] == ("worse" if contest["adjusted_p"] < 0.05 else "tie")


def test_a_comparison_goes_on_where_it_stopped(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"adamw": {"learning_rates": [0.003, 0.01]}, "mezo": {"learning_rates": [1e-4]}}
    configured(workspace, {"budget": "90 evaluations", "seeds": 1, "points": 2, "methods": methods})
    assert run(["compare", "config.yaml", "--out", "whole"]) == 0
    step, made, stops = Trainer._step, 0, {3, 4, 13}  # within a run, soon after, and in another method's run

    def counted(self: Trainer) -> Any:
        nonlocal made
        made += 1
        if made in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "_step", counted)
    codes = [run(["compare", "config.yaml", "--out", "parts"]) for _ in range(4)]
    assert codes == [75, 75, 75, 0]
    assert "stopped by SIGTERM; to go on, give the same command again" in capsys.readouterr().err
    whole, parts = result(workspace, "whole"), result(workspace, "parts")
    assert timeless(parts) == timeless(whole)
    assert [record["steps"] for record in whole["runs"]] == [5, 5, 5, 7]
    assert made == 5 + 5 + 5 + 7 + len(stops), "a step that a signal stopped is made again"
    # more seeds are more runs, and no more than that
    stops.clear()
    assert run(["compare", "config.yaml", "--out", "parts", "--seeds", "2"]) == 0
    assert made == 25 + 5 + 7
    assert [record["seed"] for record in result(workspace, "parts")["runs"]] == [0, 0, 1, 1, 2, 2]
    # what would make other runs of those that are there is refused
    capsys.readouterr()
    other = ["compare", "config.yaml", "--budget", "36 evaluations", "--methods", "adamw"]
    assert run([*other, "--out", "parts"]) == 2
    assert "budget: '90 evaluations' -> '36 evaluations'" in capsys.readouterr().err
    assert run(["compare", "config.yaml", "--out", "parts", "--set", "training.batch_size=5"]) == 2
    assert "adamw: training.batch_size: 6 -> 5" in capsys.readouterr().err
    stops.add(made + 1)
    assert run([*other, "--out", "parts", "--fresh"]) == 75
    assert "give the same command again, with --out parts-2 in place of --fresh" in capsys.readouterr().err
    assert run([*other, "--out", "parts-2"]) == 0
    assert len(result(workspace, "parts-2")["runs"]) == 3


def test_a_run_spends_its_budget_to_the_end(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Early stopping would make budgets unequal, and the best evaluation is one on the half that is reported."""
    configured(workspace, {"budget": "90 evaluations", "seeds": 1, "methods": {"adamw": {"learning_rates": [1.0]}}})
    config = yaml.safe_load((workspace.root / "config.yaml").read_text())
    config["data"]["format"] = {"type": "text", "column": "sentence"}
    config["training"]["on_divergence"] = "rollback"
    best = {"load_best_model_at_end": True, "early_stopping_patience": 1, "early_stopping_threshold": 100.0}
    config["evaluation"] = {"every": "1 steps", "metrics": ["perplexity", "loss"], **best}
    (workspace.root / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(["compare", "config.yaml", "--no-cache"]) == 0
    assert "early stopping are left out" in capsys.readouterr().err
    content = result(workspace)
    [record] = content["runs"]
    assert record["steps"] == content["plans"]["adamw"]["steps"] == 5
    assert record["points"][-1]["values"]["loss"] == pytest.approx(record["final"]["loss"], rel=1e-5)
    assert content["results"]["metric"] == "loss", "of which perplexity is a function"
    written = yaml.safe_load((workspace.root / "runs/tiny-compare/runs/adamw-lr1-seed1/config.yaml").read_text())
    assert written["training"]["on_divergence"] == "stop"
    assert written["evaluation"]["load_best_model_at_end"] is False
    assert not list(Path(os.environ["VAMO_FT_CACHE"]).rglob("*.safetensors"))


def test_the_clock_ends_a_run_that_is_slower_than_its_pilot(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(workspace, {"budget": "0.4 seconds", "seeds": 1, "methods": {"adamw": {"learning_rates": [0.01]}}})
    step = Trainer._step

    def slow(self: Trainer) -> Any:
        record = step(self)
        self.state.seconds += 0.05
        return record

    monkeypatch.setattr(Trainer, "_step", slow)
    assert run(["compare", "config.yaml"]) == 0
    [record] = result(workspace)["runs"]
    assert record["state"] == "out of time"
    assert 0 < record["steps"] < result(workspace)["plans"]["adamw"]["steps"]
    assert 0.4 <= record["spent"] == record["seconds"]
    assert record["seconds"] - record["seconds"] / record["steps"] < 0.4 + 0.1
    assert record["final"].keys() == {"loss", "accuracy"}


def test_what_is_printed_and_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(
        workspace,
        {"budget": "1k evaluations", "methods": {"sgd": {"learning_rates": [0.1]}, "mezo": {"learning_rates": [1e30]}}},
    )
    command = ["compare", "config.yaml", "--methods", "mezo,sgd,vamo-twice", "--budget", "260 evaluations"]
    vamo = "compare.methods.vamo-twice.set.method"
    twice = ["--set", f"{vamo}.name=vamo", "--set", f"{vamo}.eps=1e-3", "--learning-rates", "vamo-twice=0.01"]
    assert run([*command, *twice, "--seeds", "2", "--set", "compare.points=2"]) == 0
    output = capsys.readouterr()
    assert "\x1b" not in output.out
    assert "accuracy after 260 evaluations, 2 seeds, 6 held-out samples" in output.out
    assert "diverged (2 of 2)" in output.out
    assert "run 1 of 6: mezo-lr1e+30-seed1" in output.err
    content = result(workspace)
    labels = [method["label"] for method in content["results"]["methods"]]
    assert labels == ["mezo", "sgd", "vamo-twice"]
    assert content["results"]["reference"] == "mezo"  # the first, since adamw, the file's own, is not compared
    mezo = content["results"]["methods"][0]
    assert (mezo["median"], mezo["mean"], mezo["diverged"], mezo["values"]) == (None, None, 2, [None, None])
    text = (workspace.root / "runs" / "tiny-compare" / "compare.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["method", "---", *labels]
    picture: Path = workspace.root / "runs" / "tiny-compare" / "compare.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list((workspace.root / "runs" / "tiny-compare" / "runs").glob("*/checkpoints"))
    monkeypatch.setattr(Trainer, "_step", None)
    assert run([*command, *twice, "--seeds", "2", "--set", "compare.points=2"]) == 0  # nothing is left to do


@pytest.mark.parametrize(
    ("compare", "arguments", "said"),
    [
        (None, [], "compare: names no methods; add --methods vamo,mezo"),
        (None, ["--methods", "vamo"], "compare.budget: required"),
        (None, ["--methods", "vamo,,"], "--methods vamo,,: write names separated by commas"),
        ({"budget": "5 evaluations", "methods": {"adamw": {}}}, [], "does not reach for one step of adamw"),
        ({"budget": "5 apples", "methods": {"adamw": {}}}, [], "must be a number above 0 and a currency"),
        ({"budget": "5 flops", "methods": {"adam": {}}}, [], "compare.methods.adam: is not the name of a method"),
        (
            {"budget": "5 flops", "methods": {"adamw": {"set": {"data.max_length": 9}}}},
            [],
            "data.max_length: is the same for all methods",
        ),
        ({"budget": "5 flops", "methods": {"mezo": {"set": {"method.probs": 9}}}}, [], "Did you mean 'probes'?"),
        ({"budget": "5 flops", "methods": {"adamw": {}}, "seeds": [0, 1]}, [], "0 is one of seeds"),
        ({"budget": "5 flops", "methods": {"adamw": {}}, "metric": "f1"}, [], "f1 is not one of evaluation.metrics"),
        ({"budget": "5 flops", "methods": {"adamw": {}}}, ["--learning-rates", "0.1"], "write it as METHOD=A,B"),
        (None, ["--methods", "sgd", "--learning-rates", "mezo=0.1"], "mezo is none of --methods sgd"),
        (None, ["--seeds", "few"], "--seeds few: write how many, such as 5, or the seeds themselves"),
        (None, ["--budget", "5"], "--budget: must be a number above 0 and a currency"),
        ({"budget": "5 flops", "methods": {"adamw": {}}, "metric": "perplexity"}, [], "the exponential of loss"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(
    workspace: Workspace,
    compare: dict[str, Any] | None,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configured(workspace, compare) if compare else workspace.configure({"model": {"adapter": LORA}})
    assert run(["compare", "config.yaml", *arguments]) == 2
    assert said in capsys.readouterr().err
