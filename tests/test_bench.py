"""The benchmarks: that they run and report what they say, and that MeZO is taken literally. No figure is judged."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from scripts.benchmarks import __main__ as command
from scripts.benchmarks import case_memory
from scripts.benchmarks.literal_mezo import LiteralMezo
from scripts.benchmarks.memory_probe import can_measure, peak_memory, present_memory
from scripts.benchmarks.methods import mean_loss, objective_of
from scripts.benchmarks.results import at_least, at_most, compare
from scripts.benchmarks.setting import Setting
from scripts.benchmarks.timing import Contender, measure

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = Setting(model="tiny", batch=2, length=8, labelled=2, repeats=1, warmup=0, device=CPU)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case, the memory of processes made up."""
    out = tmp_path_factory.mktemp("bench") / "deeper" / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case_memory, "_probe", _made_up_peaks)
        command.main(
            [
                "--model=tiny",
                "--device=cpu",
                "--repeats=1",
                "--warmup=0",
                "--batch=2",
                "--length=8",
                "--threads=1",
                f"--out={out}",
            ]
        )
    loaded: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return loaded


def _made_up_peaks(setting: Setting, *, work: str, dtype: str) -> dict[str, Any]:
    if work == "mezo block":
        return {"note": "not available"}
    return {"first": 400, "steady": 300 if work == "mezo" else 200}


def test_every_case_reports(report: dict[str, Any]) -> None:
    assert list(report) == ["machine", "options", "model", "cases"]
    assert {"device", "cpu", "threads", "torch"} <= set(report["machine"])
    assert report["model"]["parameters"] == TINY.num_parameters
    assert list(report["cases"]) == list(command.CASES)
    for case in report["cases"].values():
        assert case["rows"] or case["notes"]
        assert case["seconds"] > 0


def test_rows_hold_positive_ratios(report: dict[str, Any]) -> None:
    rows = [row for case in report["cases"].values() for row in case["rows"]]
    assert len(rows) >= 20
    for row in rows:
        lower, upper = row["quartiles"]
        assert 0 < lower <= row["ratio"] <= upper
        assert row["ratio"] == pytest.approx(row["a_median"] / row["b_median"])
        assert row["unit"] in ("s", "MiB")
        assert row["target"] is None or row["target"]["verdict"] in ("aim", "reached", "missed")
    assert all(row["gb_per_s"]["a"] > 0 for row in report["cases"]["sweep"]["rows"] if "axpy_" in row["a"])


def test_memory_compares_with_inference(report: dict[str, Any]) -> None:
    case = report["cases"]["memory"]
    assert [row["extra_percent"] for row in case["rows"]] == [50.0, 0.0] * 2
    assert case["notes"] == ["mezo block: not available"]


def test_literal_mezo_equals_its_closed_form() -> None:
    eps, learning_rate, seed = 1e-3, 1e-2, 7
    model, batch = TINY.build_model(torch.float64), TINY.one_batch()
    names, before = zip(*((name, p.detach().clone()) for name, p in model.named_parameters()), strict=True)
    generator = torch.Generator().manual_seed(seed)
    z = [torch.normal(0.0, 1.0, size=p.shape, generator=generator, dtype=p.dtype) for p in before]

    def loss_at(step: float) -> torch.Tensor:
        moved = {name: p + step * direction for name, p, direction in zip(names, before, z, strict=True)}
        columns = batch.targets["positions"]
        logits = functional_call(model, moved, (), {"input_ids": batch.inputs["input_ids"]}).logits[:, columns]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets["tokens"].flatten())

    with torch.no_grad():
        expected = float(loss_at(eps) - loss_at(-eps)) / (2 * eps)
    parameters = list(model.parameters())
    mezo = LiteralMezo(parameters, lambda: mean_loss(objective_of(model), batch), eps=eps, learning_rate=learning_rate)
    assert mezo.step(seed) == pytest.approx(expected, rel=1e-8)
    assert abs(expected) > 1e-3
    for parameter, old, direction in zip(parameters, before, z, strict=True):
        torch.testing.assert_close(
            parameter.detach(), old - learning_rate * expected * direction, rtol=1e-9, atol=1e-12
        )


def test_contenders_alternate_and_turns_spread() -> None:
    order: list[str] = []

    def call(name: str) -> Contender:
        return Contender(name, lambda: order.append(name), turns=4 if name == "b" else 1)

    timings = measure([call("a"), call("b"), call("c")], repeats=2, warmup=1, device=CPU)
    assert "".join(order) == "bbacbb" * 3
    assert {name: len(seconds) for name, seconds in timings.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratio_is_formed_within_each_round() -> None:
    own = iter([9.0, 2.0, 40.0])  # the second contender takes 1, 1 and 10 seconds in the same rounds
    other = iter([1.0, 1.0, 10.0])
    timings = measure(
        [Contender("a", lambda: next(own)), Contender("b", lambda: next(other))], repeats=3, warmup=0, device=CPU
    )
    row = compare("both", timings, "a", "b")
    assert (row.ratio, row.quartiles, row.a_median, row.b_median) == (4.0, (3.0, 6.5), 9.0, 1.0)


def test_verdicts() -> None:
    assert [at_least(2, 3).verdict(ratio) for ratio in (1.9, 2.0, 3.0)] == ["missed", "reached", "aim"]
    assert [at_most(2, 1).verdict(ratio) for ratio in (2.1, 2.0, 1.0)] == ["missed", "reached", "aim"]


@pytest.mark.skipif(not can_measure(CPU), reason="needs /proc")
@pytest.mark.parametrize("resettable", [True, False])
def test_peak_memory_sees_what_was_freed(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resettable:
        monkeypatch.setattr("scripts.benchmarks.memory_probe._set_mark_back", lambda: False)
    size = 1 << 26
    torch.ones(4 * size, dtype=torch.uint8)  # an earlier and higher peak
    with peak_memory(CPU):
        pass  # what was free before is now given back, and no part of the figures
    before = present_memory(CPU)
    with peak_memory(CPU) as peak:
        for _ in range(5):
            torch.ones(size, dtype=torch.uint8)
    assert 0.8 * size < peak.bytes - before < 3 * size


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^scripts/bench: not available: torch sees no CUDA device$"):
        command.main(["--device=cuda", f"--out={tmp_path / 'bench.json'}"])
    assert not (tmp_path / "bench.json").exists()


def test_wrapper_runs_the_module() -> None:
    text = (ROOT / "scripts" / "bench").read_text(encoding="utf-8")
    assert os.access(ROOT / "scripts" / "bench", os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert text.splitlines()[-2:] == ["scripts/setup", 'exec .venv/bin/python -m scripts.benchmarks "$@"']
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / "bench"], check=False).returncode == 0
