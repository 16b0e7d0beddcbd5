"""`vamo-ft diagnose` on the tiny model, from the configuration to the picture."""

import json
from typing import Any

import pytest

from tests.tiny import sentiment_rows, write_jsonl
from tests.workspace import ADAMW, LORA, Workspace
from vamo_ft.cli import run

FEW = ["--samples", "6", "--steps", "4", "--batches", "8"]


def diagnosed(workspace: Workspace, changes: dict[str, Any], *arguments: str) -> dict[str, Any]:
    workspace.configure(changes)
    assert run(["diagnose", "config.yaml", *FEW, *arguments]) == 0
    folder = "here" if "--out" in arguments else "runs/tiny-diagnose"
    return json.loads((workspace.root / folder / "diagnose.json").read_text())


@pytest.mark.parametrize("structure", ["full", "gradient_subspace"])
def test_vamo(workspace: Workspace, structure: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(workspace.root / "train.jsonl", sentiment_rows(120))
    directions: dict[str, Any] = {"structure": structure}
    if structure == "gradient_subspace":
        directions["warmup_steps"] = 4
    vamo = {"name": "vamo", "probes": 2, "difference": "forward", "directions": directions}
    found = diagnosed(
        workspace, {"model": {"adapter": LORA}, "method": {**vamo, "snapshot": {"every": "4 steps"}}, **ADAMW}
    )
    assert (found["step"], found["num_probes"], found["num_samples"], found["num_batches"]) == (4, 2, 6, 8)
    assert found["num_trainable"] == 448
    assert found["seen"] == 0
    assert found["size_key"] == ("method.eps" if structure == "full" else "method.radius")
    assert [curve["difference"] for curve in found["errors"]] == ["forward", "central"]
    assert all(curve["errors"][4]["correlation"] > 0.9 for curve in found["errors"])
    assert found["shares"].keys() == {"configured", "isotropic", "informed"}
    assert found["shares"]["isotropic"] < 0.1 < found["shares"]["informed"] <= 1
    assert (found["shares"]["configured"] == found["shares"]["informed"]) == (structure == "gradient_subspace")
    rows = found["variance"]["rows"]
    assert [row["age"] for row in rows] == [0, 1, 2, 4]
    assert all(row["best"]["value"] <= row["one"]["value"] + 1e-12 for row in rows)
    assert rows[0]["best"]["value"] == pytest.approx(1 - found["shares"]["configured"], abs=0.25)
    # an epoch is 20 steps, and has 5 snapshots of 3 forward passes for each of 120 samples
    assert found["cost"]["plain"]["forward_samples"] == found["cost"]["plain"]["backward_samples"] == 120
    assert found["cost"]["method"]["forward_samples"] == 120 + 5 * 3 * 120
    assert found["cost"]["kappa"] > 5
    assert (workspace.root / "runs" / "tiny-diagnose" / "diagnose.png").read_bytes().startswith(b"\x89PNG")
    assert not (workspace.root / "runs" / "tiny").exists()
    printed = capsys.readouterr().out
    assert found["verdict"]["text"] in printed
    assert found["size_verdict"] in printed
    assert "written: runs/tiny-diagnose/diagnose.json" in printed
    assert "\x1b" not in printed  # plain where there is no terminal


@pytest.mark.parametrize(
    ("snapshot", "passes"),
    [
        # at most one forward pass for each of training: 3 for each of 120 samples once in 3 epochs
        ({"every": "4 steps", "refresh": "adaptive"}, 120),
        ({"every": "4 steps", "refresh": "adaptive", "budget": 2.0}, 240),
        # the budget allows more than the period asks for
        ({"every": "1 epoch", "refresh": "adaptive", "budget": 9.0}, 3 * 120),
    ],
)
def test_an_adaptive_refresh_costs_what_its_budget_allows(
    workspace: Workspace, snapshot: dict[str, Any], passes: int
) -> None:
    write_jsonl(workspace.root / "train.jsonl", sentiment_rows(120))
    vamo = {"name": "vamo", "probes": 2, "eps": 1e-3, "difference": "forward", "snapshot": snapshot}
    found = diagnosed(workspace, {"model": {"adapter": LORA}, "method": vamo, **ADAMW})
    assert found["cost"]["method"]["forward_samples"] == pytest.approx(120 + passes)


def test_the_same_command_gives_the_same_figures(workspace: Workspace) -> None:
    vamo = {"name": "vamo", "eps": 1e-3, "source": "recompute", "snapshot": {"every": "1 epoch"}}
    first = diagnosed(workspace, {"model": {"adapter": LORA}, "method": vamo})
    assert diagnosed(workspace, {"model": {"adapter": LORA}, "method": vamo}) == first
    assert first["seen"] > 0  # 20 samples are too few for held-out ones
    assert first["size"] == 1e-3


def test_mezo_by_blocks(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosed(
        workspace, {"method": {"name": "mezo_bcd"}, "optimizer": {"learning_rate": 1e-6}}, "--out", "here"
    )
    assert found["variance"] is found["verdict"] is None
    assert {"structure", "model.embed_tokens", "model.layers.0", "lm_head"} <= found["reach"].keys()
    assert 0.5 < found["cost"]["kappa"] < 1  # two forward passes, against one and a backward pass
    assert "correction" not in capsys.readouterr().out
    assert (workspace.root / "here" / "diagnose.png").is_file()


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        (
            {},
            [],
            "method.name: adamw is not diagnosed, only vamo, spsa and the presets of spsa; try --set "
            "'method={name: vamo}' to see what a correction would give, or --set 'method={name: mezo}'",
        ),
        (
            {"method": {"name": "mezo"}, "objective": {"type": "metric", "name": "accuracy"}},
            [],
            "objective.type: metric has no gradient to compare with; try --set 'objective={type: loss}'",
        ),
        (
            {"method": {"name": "mezo"}, "training": {"stream_layers": True}},
            [],
            "training.stream_layers: back-propagation, which losses are compared with, needs all layers at once; try "
            "--set training.stream_layers=false",
        ),
        (
            {"method": {"name": "vamo", "directions": {"structure": "gradient_subspace"}}},
            [],
            "--steps 4: method.directions.warmup_steps asks for 32 before the first snapshot",
        ),
        ({"method": {"name": "vamo"}}, ["--out", "train.jsonl/x"], "--out train.jsonl/x: cannot be made"),
        ({"method": {"name": "vamo"}}, ["--batches", "2"], "'--batches'"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(
    workspace: Workspace,
    changes: dict[str, Any],
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace.configure(changes)
    assert run(["diagnose", "config.yaml", *FEW, *arguments]) == 2
    assert said in capsys.readouterr().err
