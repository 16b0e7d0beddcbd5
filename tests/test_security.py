"""Nothing that is read runs code, and no secret reaches what is written or printed."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.refusals import check_refused
from tests.tiny import Planted, write_jsonl
from tests.workspace import LORA, Workspace
from vamo_ft.cli import run
from vamo_ft.commands import train
from vamo_ft.commands.secrets import masked
from vamo_ft.core.errors import ProcessLostError
from vamo_ft.training.checkpoint import _digest

PICKLES = ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin", "state.pkl", "scaler.pth")


@pytest.fixture
def trace(workspace: Workspace) -> Path:
    """The file that every planted attack makes; each kind of them is shown to work first."""
    trace = workspace.root / "trace"
    pickle.loads(pickle.dumps(Planted(trace)))
    assert trace.exists()
    trace.unlink()
    return trace


def _plant(folder: Path, trace: Path) -> None:
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Planted(trace)))
    torch.save(Planted(trace), folder / "rng_state.pth")
    (folder / "README.md").write_text(f"---\n{_yaml_attack(trace)}\n---\n")
    for name in ("sitecustomize.py", "modeling_llama.py", "configuration.py", "__init__.py"):
        (folder / name).write_text(_python_attack(trace))


def _yaml_attack(trace: Path) -> str:
    return f"tags: !!python/object/apply:os.system ['touch {trace}']"


def _python_attack(trace: Path) -> str:
    return f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_planted_files_are_not_opened(
    workspace: Workspace, trace: Path, adapter: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(workspace.root / "model", trace)
    workspace.configure({"model": {"adapter": adapter}})
    assert workspace.train("--set", "training.steps=3") == 0
    checkpoint = workspace.directory() / "checkpoints" / "step-00000003"
    for folder in (checkpoint, checkpoint / "model", checkpoint / "state", workspace.directory() / "model"):
        _plant(folder, trace)
    assert run(["evaluate", "runs/tiny"]) == 0
    assert run(["evaluate", str(checkpoint)]) == 0
    assert workspace.train("--resume", str(checkpoint), "--set", "training.steps=5") == 0
    assert "going on from" in (workspace.directory() / "log.txt").read_text()

    (workspace.root / "model" / "model.safetensors").unlink()
    message = "model: has no model.safetensors; weights in other formats, such as pickled .bin, are not opened"
    check_refused(workspace, message, capsys, "train", "config.yaml", "--set", "run.name=new")
    for weights in (workspace.directory() / "model").glob("*.safetensors"):
        weights.unlink()
    assert run(["evaluate", "runs/tiny"]) == 2
    assert not trace.exists()


def test_yaml_tags_are_refused(workspace: Workspace, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workspace.root / workspace.configure()
    path.write_text(f"{path.read_text()}{_yaml_attack(trace)}\n")
    said = "tags: the YAML tag '!!python/object/apply:os.system' is not allowed; write a plain value"
    check_refused(workspace, f"config.yaml:35: {said}", capsys)
    (workspace.directory() / "model").mkdir(parents=True)
    path.rename(workspace.directory() / "config.yaml")
    check_refused(workspace, f"runs/tiny/config.yaml:35: {said}", capsys, "evaluate", "runs/tiny")
    workspace.configure()
    attack = _yaml_attack(trace).removeprefix("tags: ")
    message = "--set run.name: the YAML tag '!!python/object/apply:os.system' is not allowed; write a plain value"
    check_refused(workspace, message, capsys, "train", "config.yaml", "--set", f"run.name={attack}")
    assert not trace.exists()


REMOTE: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"model_type": "new", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}),
    ("tokenizer_config.json", {"tokenizer_class": "New", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}),
]


@pytest.mark.parametrize(("name", "keys"), REMOTE)
def test_code_that_comes_with_a_model_is_refused(
    workspace: Workspace, trace: Path, name: str, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace.root / "model" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    (path.parent / "code.py").write_text(_python_attack(trace))
    if name == "tokenizer_config.json":
        (path.parent / "tokenizer.json").unlink()  # as with a tokenizer that only its own code can read
    workspace.configure()
    message = (
        "model.path: model: comes with Python code of its own, which is not run; read it, and set "
        "model.trust_remote_code: true to run it"
    )
    check_refused(workspace, message, capsys)
    assert not trace.exists()


def test_code_of_a_model_that_is_known_is_ignored(workspace: Workspace, trace: Path) -> None:
    path = workspace.root / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": REMOTE[0][1]["auto_map"]}))
    (path.parent / "code.py").write_text(_python_attack(trace))
    workspace.configure({"training": {"steps": 1}})
    assert workspace.train() == 0
    assert not trace.exists()


# Manifests: an attacker can give them the hash that belongs to them.


def _rename_entry(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("model/config.json")

    return edit


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.__setitem__(key, value)


MANIFESTS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_rename_entry("../outside"), "../outside points outside of the checkpoint"),
    (_rename_entry("model/../../../outside"), "model/../../../outside points outside of the checkpoint"),
    (_rename_entry("/etc/hostname"), "/etc/hostname points outside of the checkpoint"),
    (_rename_entry("model/link"), "model/link is a symbolic link"),
    (_rename_entry("linked/config.json"), "linked is a symbolic link"),
    (_rename_entry("a\0b"), "MANIFEST.json is damaged: an entry of files is not a name with its size and SHA-256"),
    (_set("files", []), "MANIFEST.json is damaged: an entry of files is not a name with its size and SHA-256"),
    (_set("files", {"x": 1}), "MANIFEST.json is damaged: an entry of files is not a name with its size and SHA-256"),
    (
        _set("files", {"x": {"size": "1", "sha256": ""}}),
        "MANIFEST.json is damaged: an entry of files is not a name with its size and SHA-256",
    ),
    (_set("step", "1"), "MANIFEST.json is damaged: step is not a whole number"),
    (_set("facts", []), "MANIFEST.json is damaged: facts is not an object"),
]


@pytest.mark.parametrize(("edit", "message"), MANIFESTS)
def test_manifests(
    workspace: Workspace, edit: Callable[[dict[str, Any]], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"training": {"steps": 1}, "data": {"evaluation": None}, "evaluation": {"every": None}})
    assert workspace.train("--set", "evaluation.metrics=[loss]") == 0
    checkpoint = workspace.directory() / "checkpoints" / "step-00000001"
    shutil.copy(checkpoint / "model" / "config.json", workspace.directory() / "checkpoints" / "outside")
    (checkpoint / "model" / "link").symlink_to("config.json")
    (checkpoint / "linked").symlink_to("model")
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest.pop("sha256")
    edit(manifest)
    (checkpoint / "MANIFEST.json").write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    arguments = ("train", "config.yaml", "--set", "evaluation.metrics=[loss]", "--resume", str(checkpoint))
    check_refused(workspace, f"{checkpoint}: {message}", capsys, *arguments)


# Secrets

TOKENS = {
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "WANDB_API_KEY": "planted-0123456789",
    "MY_PASSWORD": "correct horse",
}


def test_secrets_of_the_environment_are_not_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    workspace.configure({"training": {"steps": 3}})
    assert workspace.train() == 0
    assert run(["evaluate", "runs/tiny"]) == 0
    assert run(["validate", "config.yaml"]) == 0
    for label in TOKENS.values():  # as if a library put it into its message
        write_jsonl(workspace.root / "train.jsonl", [{"sentence": "a", "label": label}])
        assert workspace.train("--set", "run.name=failed") == 2
        assert run(["--debug", "train", "config.yaml", "--set", "run.name=failed"]) == 2
        assert json.loads((workspace.directory("failed") / "status.json").read_text())["message"] == (
            "train.jsonl: row 1: label '***' is not among data.format.labels (0, 1)"
        )
    captured = capsys.readouterr()
    assert "label '***' is not among" in captured.err
    assert "Traceback" in captured.err
    for path in (path for path in (workspace.root / "runs").rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert [name for name, value in TOKENS.items() if value.encode() in content] == [], path
    for value in TOKENS.values():
        assert value not in captured.out + captured.err


def test_what_a_lost_process_said_is_masked(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKENS["HF_TOKEN"])

    def lost(*arguments: Any, **keywords: Any) -> None:
        raise ProcessLostError(f"lost with {TOKENS['HF_TOKEN']}")

    monkeypatch.setattr(train, "train_run", lost)
    workspace.configure()
    assert workspace.train() == 1
    assert json.loads((workspace.directory() / "status.json").read_text())["message"] == (
        "lost with ***; to go on, train tiny again with the same settings (after --fresh: with --set run.name=tiny in "
        "its place)"
    )


def test_log_lines_are_masked(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKENS["HF_TOKEN"])

    def warn(config: object) -> list[str]:
        logging.getLogger("vamo_ft").warning("from %s, \ud800", f"https://me:{TOKENS['HF_TOKEN']}@host/x")
        return []

    monkeypatch.setattr("vamo_ft.commands.train.config_warnings", warn)
    workspace.configure({"training": {"steps": 1}})
    assert workspace.train() == 0
    assert "WARNING from https://***@host/x, \\ud800\n" in (workspace.directory() / "log.txt").read_text()
    assert "from https://***@host/x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/a", "https://***@host/a"),
        ("https://host/a?access_token=abc&x=1", "https://host/a?access_token=***&x=1"),
        ("https://host/a?X-Amz-Signature=abc", "https://host/a?X-Amz-Signature=***"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrst failed", "*** failed"),
        ("user@host, hf_model, tokens=3", "user@host, hf_model, tokens=3"),
        ("a token of false", "a token of false"),
        ("planted planted-more", "******"),
    ],
)
def test_masked(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"A_TOKEN": "planted-more", "B_SECRET": "planted ", "TOKENIZERS_PARALLELISM": "false"}.items():
        monkeypatch.setenv(name, value)
    assert masked(text) == shown
