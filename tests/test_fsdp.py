"""Runs in which processes share the model out: what one process computes, and checkpoints for any number of them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.test_processes import finish, free_port, start, started_run, status
from tests.tiny import save_model_folder, tiny_llama, tiny_llama_classifier, write_jsonl
from tests.workspace import ADAMW, LORA, MEZO, VAMO, Workspace, base_config, equal_weights, merged, weights_in
from vamo_ft.training.checkpoint import open_checkpoint

INFORMED = {
    "method": {
        "name": "vamo",
        "probes": 2,
        "alpha": 1.0,
        "directions": {"structure": "gradient_subspace", "warmup_steps": 3},
        "snapshot": {"every": "4 steps"},
    },
    "optimizer": {"name": "sgd", "learning_rate": 0.05},
}

PROBED: dict[str, dict[str, Any]] = {
    "mezo": MEZO,
    "mezo_lora": {**MEZO, "model": {"adapter": LORA}},
    "mezo_bcd": {**MEZO, "method": {"name": "mezo_bcd"}, "model": {"dtype": "bfloat16"}},
    "sphere": {**MEZO, "method": {"name": "mezo", "probes": 2, "directions": {"distribution": "sphere"}}},
}
"""Every process computes the losses of whole batches of the step: to the bit what one process computes."""

DIFFERENTIATED: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "adamw_lora": {**ADAMW, "model": {"adapter": LORA}, "training": {"activation_checkpointing": True}},
    "adagrad_bfloat16": {
        "method": {"name": "adagrad"},
        "model": {"dtype": "bfloat16"},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2},
    },
    "sgd": {"method": {"name": "sgd"}, "optimizer": {"learning_rate": 0.05}, "training": {"max_grad_norm": None}},
    "sgd_clipped": {"method": {"name": "sgd"}, "optimizer": {"learning_rate": 1.0}, "training": {"max_grad_norm": 0.1}},
    "vamo": merged(VAMO, {"method": {"alpha": 1.0}, "optimizer": {"name": "sgd", "learning_rate": 0.05}}),
    "vamo_adaptive": {
        "method": {"name": "vamo", "probes": 2, "eps": "auto", "alpha": "adaptive", "snapshot": {"every": "40 steps"}},
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "training": {"steps": 20},
    },
    "vamo_recompute": {"method": {**VAMO["method"], "source": "recompute", "alpha": 0.5}},
    "new_head": {"model": {"task": "sequence_classification"}, "optimizer": {"learning_rate": 1e-3}},
    "new_head_lora": {**ADAMW, "model": {"task": "sequence_classification", "adapter": LORA}},
    "vamo_lora": {**INFORMED, "model": {"adapter": LORA}},
    "vamo_offload": merged({**INFORMED, "model": {"adapter": LORA}}, {"method": {"snapshot": {"offload": True}}}),
    "master_weights": {
        "model": {"dtype": "bfloat16"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "master_weights": True},
        "training": {"steps": 2},
    },
}
"""Gradients are summed in another order."""


def configured(workspace: Workspace, name: str, changes: dict[str, Any], *, fsdp: bool, processes: int = 2) -> str:
    run = {"run": {"name": f"{name}-{'shared' if fsdp else 'alone'}"}}
    training = {"training": {"fsdp": fsdp, "micro_batch_size": 6 // processes}}
    return workspace.configure(merged(merged(changes, training), run), file=f"{run['run']['name']}.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace in which two processes have trained every case."""
    workspace = Workspace(tmp_path_factory.mktemp("shared"))
    files = [configured(workspace, name, case, fsdp=True) for name, case in {**PROBED, **DIFFERENTIATED}.items()]
    workspace.directory("mezo-shared").mkdir(parents=True)
    (workspace.directory("mezo-shared") / "seedlog.bin").write_bytes(b"of an attempt that did not share the model out")
    arguments = [word for file in files for word in (file, str(free_port()))]
    codes, errors = finish(start("tests.shards", *arguments, cwd=workspace.root))
    assert codes == [0, 0], errors
    return workspace


def trained_alone(workspace: Workspace, name: str, changes: dict[str, Any], *, processes: int = 2) -> Path:
    config = configured(workspace, name, changes, fsdp=False, processes=processes)
    before = Path.cwd()
    os.chdir(workspace.root)
    try:
        assert workspace.train(config=config) == 0
    finally:
        os.chdir(before)
    return workspace.directory(f"{name}-alone") / "model"


@pytest.mark.parametrize("name", PROBED)
def test_probes_give_the_bits_of_one_process(name: str, trained: Workspace) -> None:
    alone = trained_alone(trained, name, PROBED[name])
    assert equal_weights(trained.directory(f"{name}-shared") / "model", alone)
    assert losses(trained, f"{name}-shared") == losses(trained, f"{name}-alone")


def test_no_seed_log_is_written(trained: Workspace) -> None:
    assert trained.seed_log("mezo-shared") is None


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_those_of_one_process(name: str, trained: Workspace) -> None:
    alone = weights_in(trained_alone(trained, name, DIFFERENTIATED[name]))
    shared = weights_in(trained.directory(f"{name}-shared") / "model")
    assert shared.keys() == alone.keys() != set()
    bits = torch.finfo(next(iter(alone.values())).dtype).eps
    for key, tensor in alone.items():
        torch.testing.assert_close(shared[key], tensor, rtol=bits, atol=max(2e-6, bits / 8))
    for line, expected in zip(trained.metrics(f"{name}-shared"), trained.metrics(f"{name}-alone"), strict=True):
        figures, right = ({k: v for k, v in each.items() if k.startswith("method.")} for each in (line, expected))
        assert figures == pytest.approx(right, rel=1e-2, abs=1e-9)


def test_answers_end_at_different_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose answers have ended makes passes along with the others."""
    monkeypatch.chdir(tmp_path)
    workspace, model = Workspace(tmp_path), tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(40)  # another token, another answer
        model.get_output_embeddings().weight[2].mul_(4)  # which ends soon
    save_model_folder(tmp_path / "model", model)
    questions = ["abc", "xyz", "mno", "qqq", "hello", "12", "Z", "..", "uvw"]
    write_jsonl(tmp_path / "questions.jsonl", [{"prompt": question, "completion": "x"} for question in questions])
    data = {"path": "questions.jsonl"}
    config = merged(
        base_config(),
        {
            "training": {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "forward_batch_tokens": 12, "fsdp": True},
            "evaluation": {"metrics": ["loss", "f1"], "max_new_tokens": 12},
        },
    )
    config["data"] = {"train": data, "evaluation": data, "format": {"type": "prompt_completion"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    codes, errors = finish(start("vamo_ft", "train", "config.yaml", cwd=tmp_path))
    assert codes == [0, 0], errors
    assert workspace.train("--set", "run.name=alone", "--set", "training.fsdp=false") == 0
    shared, alone = ([line for line in workspace.metrics(name) if "eval.f1" in line] for name in ("tiny", "alone"))
    assert shared == [pytest.approx(line, rel=1e-5) for line in alone]


HEAD = {"model": {"path": "classifier", "task": "sequence_classification", "freeze": ["model.*"]}}

IDLE: dict[str, dict[str, Any]] = {
    "mezo": merged(MEZO, HEAD),
    "adamw": merged(ADAMW, HEAD),
    "zo_adam": merged(MEZO, merged(HEAD, {"method": {"name": "zo_adam"}, "model": {"dtype": "bfloat16"}})),
    "informed": merged(INFORMED, HEAD),
}


def test_a_process_may_have_nothing_to_train(tmp_path: Path) -> None:
    """The head of two classes has two rows, none of which falls to the third process."""
    workspace = Workspace(tmp_path)
    save_model_folder(tmp_path / "classifier", tiny_llama_classifier())
    files = [configured(workspace, name, case, fsdp=True, processes=3) for name, case in IDLE.items()]
    arguments = [word for file in files for word in (file, str(free_port()))]
    codes, errors = finish(start("tests.shards", *arguments, cwd=tmp_path, count=3))
    assert codes == [0, 0, 0], errors
    for name, case in IDLE.items():
        alone = weights_in(trained_alone(workspace, name, case, processes=3))
        torch.testing.assert_close(weights_in(workspace.directory(f"{name}-shared") / "model"), alone)


def test_each_process_saves_its_part(trained: Workspace) -> None:
    """The moments of the two files are, row by row, those that a checkpoint of one process holds as a whole."""
    trained_alone(trained, "adamw", ADAMW)
    shared, alone = (
        open_checkpoint(trained.directory(f"adamw-{which}") / "checkpoints" / "step-00000008")
        for which in ("shared", "alone")
    )
    names = sorted(path.name for path in (shared.path / "state").iterdir())
    assert [name for name in names if "part" in name] == [f"update_rule.part-{n}.safetensors" for n in (0, 1)]
    whole, reference = shared.load("update_rule"), alone.load("update_rule")
    assert whole.keys() == reference.keys()
    for name, moments in reference.items():
        torch.testing.assert_close(whole[name], moments, rtol=1e-3, atol=1e-6)


ENDLESS = {
    **ADAMW,
    "training": {"steps": 100000, "batch_size": 6, "micro_batch_size": 3, "fsdp": True},
    "evaluation": {"every": "100000 steps"},
    "checkpoint": {"every": "2 steps"},
    "logging": {"every": "1 steps", "report": False},
}


def test_a_stopped_run_goes_on_in_four_processes_and_in_one(workspace: Workspace) -> None:
    processes = started_run(workspace, ENDLESS)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = finish(processes)
    assert codes == [75, 75], errors
    assert "by a signal to another process; to go on, train tiny again" in errors[0]
    done = workspace.metrics()[-1]["step"]
    config = merged(ENDLESS, {"training": {"steps": done + 2}})
    file = workspace.configure(config)
    base = (workspace.root / "model").rename(workspace.root / "elsewhere")  # the checkpoint has all of it
    codes, errors = finish(start("vamo_ft", "train", file, cwd=workspace.root, count=4))
    assert codes == [0, 0, 0, 0], errors
    assert workspace.train("--set", f"training.steps={done + 4}") == 0
    base.rename(workspace.root / "model")
    whole = merged(config, {"run": {"name": "whole"}, "training": {"steps": done + 4, "fsdp": False}})
    assert workspace.train(config=workspace.configure(whole)) == 0
    # A rounding of the first steps is followed by AdamW, which divides it by the gradient's own size.
    for (step, loss), (same, reference) in zip(losses(workspace, "tiny"), losses(workspace, "whole"), strict=True):
        assert step == same
        assert loss == pytest.approx(reference, rel=1e-3)


RULES: dict[str, dict[str, Any]] = {
    "adamw": merged(ADAMW, {"model": {"dtype": "bfloat16"}}),
    "adagrad": {"method": {"name": "adagrad"}, "optimizer": {"learning_rate": 0.01}},
    "momentum": {"method": {"name": "sgd"}, "optimizer": {"learning_rate": 0.05, "momentum": 0.9}},
    "informed": {**INFORMED, "model": {"adapter": LORA}},
    "recompute": {"method": {**VAMO["method"], "source": "recompute", "alpha": 0.5}},
    "mezo": MEZO,
}


def test_a_run_shares_the_model_out_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that one process saved is dealt out to two, and what these save is put together by one.

    A seed log, which would tell the first steps alone, is removed.
    """
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path)

    def lasting(steps: int, *, fsdp: bool, name: str, case: dict[str, Any]) -> str:
        training = {"steps": steps, "fsdp": fsdp, "micro_batch_size": 3}
        config = merged({**case, "logging": {"every": "1 steps"}}, {"run": {"name": name}, "training": training})
        return workspace.configure(config, file=f"{name}-{steps}.yaml")

    for name, case in RULES.items():
        assert workspace.train(config=lasting(4, fsdp=False, name=name, case=case)) == 0
    files = [lasting(7, fsdp=True, name=name, case=case) for name, case in RULES.items()]
    arguments = [word for file in files for word in (file, str(free_port()))]
    codes, errors = finish(start("tests.shards", *arguments, cwd=tmp_path))
    assert codes == [0, 0], errors
    assert errors[0].count("seedlog.bin is removed: processes that share the model out do not go on with it") == 1
    for name, case in RULES.items():
        assert workspace.train(config=lasting(10, fsdp=False, name=name, case=case)) == 0
        assert workspace.seed_log(name) is None
        assert workspace.train(config=lasting(10, fsdp=False, name=f"{name}-whole", case=case)) == 0
        for (step, loss), (same, reference) in zip(
            losses(workspace, name), losses(workspace, f"{name}-whole"), strict=True
        ):
            assert step == same
            assert loss == pytest.approx(reference, rel=1e-2 if name == "adamw" else 1e-5), name
    assert workspace.weights("mezo") == workspace.weights("mezo-whole")


def losses(workspace: Workspace, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in workspace.metrics(name) if "loss" in line]


def test_a_process_that_is_killed_ends_the_others(workspace: Workspace) -> None:
    processes = started_run(workspace, ENDLESS)
    processes[1].kill()
    codes, errors = finish(processes)
    assert codes == [1, -9], errors
    assert "error: another process of the run was lost" in errors[0]
    assert "Traceback" not in errors[0]
    assert status(workspace)["state"] == "failed"
