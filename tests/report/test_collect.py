import json
import math
from pathlib import Path

import pytest

from tests.report.runs import CONFIG, evaluation_line, training_line, write_run
from vamo_ft.report.collect import RunRecord, collect_run, is_run
from vamo_ft.report.figures import differences, facts_of, next_commands


def collect(directory: Path, *, held: bool = False) -> RunRecord:
    return collect_run(directory, held=held, text=str)


def facts(run: RunRecord) -> dict[str, str]:
    return {fact.name: fact.value for fact in facts_of(run)}


def test_a_finished_run(tmp_path: Path) -> None:
    run = collect(write_run(tmp_path / "a"))
    assert (run.name, run.state, run.notes, run.marks) == ("a", "finished", [], [])
    assert list(run.training["loss"].steps) == [2, 4]
    assert list(run.training["loss"].values) == [2.0, 1.0]
    assert list(run.evaluation["accuracy"].values) == [0.5, 0.9]
    assert "samples" not in run.evaluation
    assert list(run.clock.evaluations) == [0, 80, 160]
    assert run.config["method.probes"] == "4"
    assert run.environment == {"python": "3.11.9", "packages.torch": "2.13"}
    assert facts(run) == {
        "state": "finished",
        "method": "vamo",
        "model": "some/model",
        "steps": "4",
        "training loss": "1.0000",
        "loss at the end": "2.0000",
        "best loss": "2.0000 (step 4)",
        "accuracy at the end": "0.9000",
        "best accuracy": "0.9000 (step 4)",
        "forward evaluations": "96",
        "backward evaluations": "32",
        "FLOPs": "4e+15",
        "training time": "2.0 s",
        "peak memory": "1.50 GB",
        "resumes": "0",
        "rollbacks": "0",
    }


def test_a_run_that_stopped_early_says_so_and_whose_model_it_kept(tmp_path: Path) -> None:
    state = {"state": "finished", "step": 4, "stopped_early": True, "model_step": 2}
    config = CONFIG % "tiny" + "training: {steps: 9}\n"
    run = collect(write_run(tmp_path / "a", state=state, config=config))
    assert facts(run)["steps"] == "4 of 9"
    assert facts(run)["step of the model"] == "2 (best evaluation)"
    assert run.notes == ["stopped early, for want of an improvement (evaluation.early_stopping_patience)"]


def test_what_a_method_never_knows_is_left_out(tmp_path: Path) -> None:
    lines = [training_line(2, grad_norm=None, loss=None), training_line(4, grad_norm=None, loss=None)]
    run = collect(write_run(tmp_path / "a", lines))
    assert "grad_norm" not in run.training
    assert "loss" in run.training, "one that is not finite is news"
    lines[1]["grad_norm"] = 1.0
    assert math.isnan(collect(write_run(tmp_path / "b", lines)).training["grad_norm"].values[0])


def test_the_best_is_not_always_the_last(tmp_path: Path) -> None:
    lines = [
        evaluation_line(0, None, 0.9),
        evaluation_line(1, 3.0, 0.2),
        evaluation_line(2, 4.0, 0.9),
        evaluation_line(3, None, 0.4),
    ]
    found = facts(collect(write_run(tmp_path / "a", lines)))
    assert (found["best loss"], found["loss at the end"]) == ("3.0000 (step 1)", "not finite")
    assert (found["best accuracy"], found["accuracy at the end"]) == ("0.9000 (step 0)", "0.4000")


def test_an_unfinished_line_is_left_out_without_a_word(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a")
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(json.dumps(training_line(6)).encode()[:-9])
    run = collect(directory)
    assert list(run.training["loss"].steps) == [2, 4]
    assert run.notes == []


def test_damage_is_left_out_and_told(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a")
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"loss": 1}\n{"step": true, "loss": 1}\n' + b"[" * 100_000 + b"\n")
        file.write(json.dumps(training_line(4)).encode() + b"\n")
        file.write(json.dumps(evaluation_line(4, 1.0, 1.0)).encode() + b"\n")
        file.write(json.dumps(training_line(8, loss=10**400, grad_norm="x", tokens=True)).encode() + b"\n")
    run = collect(directory)
    assert list(run.training["loss"].steps) == [2, 4, 8]
    assert math.isnan(run.training["loss"].values[-1])
    assert list(run.training["grad_norm"].steps) == list(run.training["tokens"].steps) == [2, 4]
    assert list(run.evaluation["loss"].values) == [5.0, 2.0]
    assert run.notes == [
        "5 lines of metrics.jsonl cannot be read",
        "2 lines of metrics.jsonl with no later step than before: left out",
    ]


@pytest.mark.parametrize(("held", "state"), [(True, "running"), (False, "crashed")])
def test_a_run_that_nobody_holds_has_crashed(held: bool, state: str, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a", state={"state": "running", "exit_code": None})
    run = collect(directory, held=held)
    assert run.state == state
    go_on = [] if held else [("go on", f"vamo-ft train {directory}/config.yaml")]
    assert next_commands(run) == go_on


def test_a_folder_with_next_to_nothing(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    (tmp_path / "config.yaml").write_text("{", encoding="utf-8")
    assert is_run(tmp_path)
    for name in ("status.json", "environment.json"):
        (tmp_path / name).write_text("[", encoding="utf-8")
    run = collect(tmp_path)
    assert (run.state, run.training, run.notes) == ("unknown", {}, ["config.yaml cannot be read"])
    assert facts(run)["steps"] == "–"


def test_rollbacks_and_resumes_are_marked(tmp_path: Path) -> None:
    event = {"step": 2, "event": "rollback", "message": "step 4: the loss is nan", "rollbacks": 1}
    other = {"step": 3, "event": "something new"}
    directory = write_run(tmp_path / "a", [training_line(2), event, other, training_line(4), training_line(6)])
    (directory / "log.txt").write_text(
        "2026 INFO going on from runs/a/checkpoints/step-00000004\n"
        "2026 WARNING step 4: the loss is nan; going back to it with 0.5 of the learning rate (rollback 1 of 3)\n"
        "2026 INFO vamo: 10 trainable\n"
        "2026 INFO going on from runs/a/checkpoints/step-00000002\n"
        "2026 INFO going on from runs/a/checkpoints/step-00000002\n",
        encoding="utf-8",
    )
    (directory / "metrics.discarded.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    run = collect(directory)
    assert [(mark.step, mark.kind) for mark in run.marks] == [(2, "rollback"), (2, "resume"), (4, "resume")]
    assert run.marks[0].text == "rollback to step 2: step 4: the loss is nan"
    assert run.notes == [
        "2 lines that resumes and rollbacks cut off the metrics: in metrics.discarded.jsonl, not shown"
    ]
    assert list(run.training["loss"].steps) == [2, 4, 6]


def test_only_keys_that_differ(tmp_path: Path) -> None:
    first = collect(write_run(tmp_path / "a"))
    text = CONFIG.replace("name: vamo, probes: 4", "name: mezo, probes: 4, eps: 0.1").partition("optimizer")[0] % "b"
    text += "compare: {budget: 9 flops}\n"  # the section that no run takes notice of
    second = collect(write_run(tmp_path / "b", config=text))
    assert differences([first, second]) == [
        ("method.name", ["vamo", "mezo"]),
        ("optimizer.name", ["adamw", "–"]),
        ("optimizer.learning_rate", ["0.001", "–"]),
        ("method.eps", ["–", "0.1"]),
    ]
    assert differences([first, first]) == []


def test_every_text_is_made_fit_to_be_shown(tmp_path: Path) -> None:
    lines = [training_line(1, **{"method.SECRET": 1.0}), {"step": 1, "event": "rollback", "message": "SECRET"}]
    config = "run: {name: SECRET}\nSECRET: {path: 'https://SECRET/x', list: [SECRET]}\n"
    state = {"state": "SECRET", "message": "SECRET", "time": "SECRET"}
    directory = write_run(tmp_path / "SECRET", lines, config=config, state=state)
    (directory / "environment.json").write_text(json.dumps({"SECRET": "SECRET"}))
    run = collect_run(directory, held=False, text=lambda text: text.replace("SECRET", "***"))
    assert "***" in repr(run)
    assert "SECRET" not in repr(run)
