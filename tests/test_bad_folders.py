"""Model folders, data folders and run directories that are not what they should be: exactly what is said of each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import bound_by_permissions, check_refused
from tests.tiny import (
    save_model_folder,
    tiny_llama,
    tiny_llama_classifier,
    without_special_tokens,
)
from tests.workspace import Workspace

Edit = Callable[[Path], object]


def remove(pattern: str) -> Edit:
    def edit(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return edit


def write(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def set_keys(name: str, **keys: Any) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **keys}))

    return edit


def truncate(name: str) -> Edit:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def replace_model(build: Callable[[], Any]) -> Edit:
    def edit(folder: Path) -> None:
        shutil.rmtree(folder)
        save_model_folder(folder, build())

    return edit


def small_vocabulary() -> Any:
    config = tiny_llama().config
    config.vocab_size = 100
    return type(tiny_llama())(config)


INDEX = "model.safetensors.index.json"
BACK = "put the model's own file back"
NO_TOKENIZER = (
    "model: has no tokenizer.json, and no other tokenizer that can be loaded; put the files of the model's tokenizer "
    "there"
)
NO_WEIGHTS = "model: has no model.safetensors; weights in other formats, such as pickled .bin, are not opened"
DAMAGED = (
    "model/model.safetensors: is not an intact safetensors file (Error while deserializing header: {}); copy or "
    "download it again"
)
REMOTE_CODE = (
    "model.path: model: comes with Python code of its own, which is not run; read it, and set model.trust_remote_code: "
    "true to run it"
)
MODELS: list[tuple[Edit, str]] = [
    (remove("config.json"), "model: is not a model folder: it has no config.json"),
    (write("config.json", ""), f"model/config.json:1: not valid JSON (Expecting value); {BACK}"),
    (write("config.json", '{"a": 1,\n"b"}'), f"model/config.json:2: not valid JSON (Expecting ':' delimiter); {BACK}"),
    (write("config.json", "[]"), f"model/config.json: not a JSON object; {BACK}"),
    (write("config.json", b'{"a": "\xe9"}'), f"model/config.json: not UTF-8 (byte 8); {BACK}"),
    (
        write("config.json", "{}"),
        "model.path: model: Unrecognized model in model. Should have a `model_type` key in its config.json.",
    ),
    (
        set_keys("config.json", hidden_size="big"),
        "model.path: model: StrictDataclassFieldValidationError: Validation error for field 'hidden_size': TypeError: "
        "Field 'hidden_size' expected int, got str (value: 'big')",
    ),
    (
        set_keys("config.json", num_hidden_layers=3),
        "model.path: model: the weights lack 9 tensors, such as model.layers.2.input_layernorm.weight",
    ),
    (set_keys("config.json", hidden_act="no"), "model.path: model: KeyError: 'no'"),
    (set_keys("config.json", num_attention_heads=0), "model.path: model: ZeroDivisionError: integer modulo by zero"),
    (remove("tokenizer*"), NO_TOKENIZER),
    (remove("tokenizer.json"), NO_TOKENIZER),
    (write("tokenizer.json", "["), f"model/tokenizer.json:1: not valid JSON (Expecting value); {BACK}"),
    (write("tokenizer.json", "[]"), f"model/tokenizer.json: not a JSON object; {BACK}"),
    (write("tokenizer_config.json", "[]"), f"model/tokenizer_config.json: not a JSON object; {BACK}"),
    (write("generation_config.json", "[]"), f"model/generation_config.json: not a JSON object; {BACK}"),
    (without_special_tokens, "model.path: model: the tokenizer has no pad, eos or unk token to pad with"),
    (
        replace_model(small_vocabulary),
        "model.path: model: the tokenizer gives token 223, and the model has an embedding for 100 tokens; the "
        "tokenizer belongs to another model",
    ),
    (remove("model.safetensors"), NO_WEIGHTS),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), NO_WEIGHTS),
    (truncate("model.safetensors"), DAMAGED.format("incomplete metadata, file not fully covered")),
    (write("model.safetensors", b""), DAMAGED.format("header too small")),
    (write("model.safetensors", b"\xff" * 100), DAMAGED.format("header too large")),
    (write(INDEX, "[]"), f"model/{INDEX}: not a JSON object; {BACK}"),
    (write(INDEX, "{}"), f"model/{INDEX}: is damaged: weight_map does not name a file for each tensor"),
    (
        write(INDEX, '{"weight_map": {"a": 3}}'),
        f"model/{INDEX}: is damaged: weight_map does not name a file for each tensor",
    ),
    (
        write(INDEX, '{"weight_map": {"a": "gone.safetensors"}}'),
        "model: has no gone.safetensors; weights in other formats, such as pickled .bin, are not opened",
    ),
    (
        write(INDEX, '{"weight_map": {"a": "../a.safetensors"}}'),
        f"model/{INDEX}: names ../a.safetensors, which lies outside of the folder",
    ),
    (
        write(INDEX, '{"weight_map": {"a": "/etc/a.safetensors"}}'),
        f"model/{INDEX}: names /etc/a.safetensors, which lies outside of the folder",
    ),
    (
        write(INDEX, '{"weight_map": {"a": "a.bin"}}'),
        f"model/{INDEX}: names a.bin, which is not a safetensors file; nothing else is opened",
    ),
    (
        replace_model(lambda: tiny_llama().model),
        "model.path: model: the weights lack 1 tensors, such as lm_head.weight",
    ),
    (
        write("adapter_config.json", "{}"),
        "model: holds an adapter, not a whole model; write its base model as model.path",
    ),
]


@pytest.mark.parametrize(("edit", "message"), MODELS)
def test_model_folders(workspace: Workspace, edit: Edit, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit(workspace.root / "model")
    workspace.configure()
    check_refused(workspace, message, capsys)


def test_classifier_with_other_labels(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    replace_model(lambda: tiny_llama_classifier(num_labels=3))(workspace.root / "model")
    workspace.configure({"model": {"task": "sequence_classification"}})
    message = (
        "model.path: model: its classifier has 3 labels and data.format.labels has 2; write as many, or choose a model "
        "without a classifier"
    )
    check_refused(workspace, message, capsys)


DATA: list[tuple[Edit, str]] = [
    (lambda data: data.mkdir(), "data: the folder has no .jsonl, .json, .csv or .parquet file"),
    (
        lambda data: (data.mkdir(), (data / "a.csv").touch(), (data / "b.json").touch()),
        "data: files of several kinds (a.csv, b.json); name one of them, or set split",
    ),
    (lambda data: data.touch(), "data: unknown suffix ''; use .jsonl, .json, .csv or .parquet"),
]


@pytest.mark.parametrize(("make", "message"), DATA)
def test_data_folders(workspace: Workspace, make: Edit, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(workspace.root / "data")
    workspace.configure({"data": {"train": {"path": "data"}}})
    check_refused(workspace, message, capsys)


def test_a_link_to_nothing(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace.root / "train.jsonl").unlink()
    (workspace.root / "train.jsonl").symlink_to("gone.jsonl")
    workspace.configure()
    check_refused(workspace, "train.jsonl: is a symbolic link to gone.jsonl, which is not there", capsys)


# What stands in the way of the run's own files

OTHER_NAME = "mend it, or choose another run.name"
IN_THE_WAY: list[tuple[str, str]] = [
    ("", "run.output_dir: runs/tiny cannot be written (File exists); choose a folder that can"),
    (".lock/x", "run.output_dir: runs/tiny cannot be written (Is a directory); choose a folder that can"),
    ("log.txt/x", f"run.output_dir: {{root}}/runs/tiny/log.txt cannot be written (Is a directory); {OTHER_NAME}"),
    ("metrics.jsonl/x", f"run.output_dir: runs/tiny/metrics.jsonl cannot be written (Is a directory); {OTHER_NAME}"),
    ("status.json/x", f"run.output_dir: runs/tiny/status.json cannot be written (Is a directory); {OTHER_NAME}"),
    ("config.yaml/x", f"run.output_dir: runs/tiny/config.yaml cannot be written (Is a directory); {OTHER_NAME}"),
]


@pytest.mark.parametrize(("name", "message"), IN_THE_WAY)
def test_files_in_the_way(workspace: Workspace, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = workspace.directory() / name
    path.parent.mkdir(parents=True)
    path.touch()
    workspace.configure()
    check_refused(workspace, message, capsys)


def test_a_status_without_a_readable_configuration_is_not_finished(workspace: Workspace) -> None:
    workspace.directory().mkdir(parents=True)
    (workspace.directory() / "status.json").write_text('{"state": "finished"}')
    (workspace.directory() / "config.yaml").write_bytes(b"\xff")
    workspace.configure({"training": {"steps": 1}})
    assert workspace.train() == 0
    assert len(workspace.metrics()) > 0


def test_a_log_on_a_full_disk_costs_no_run(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.directory().mkdir(parents=True)
    (workspace.directory() / "log.txt").symlink_to("/dev/full")
    workspace.configure({"training": {"steps": 1}})
    assert workspace.train() == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_whose_name_looks_like_markup(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure({"run": {"output_dir": "[red]runs[/x]"}, "training": {"steps": 1}})
    assert workspace.train() == 0
    assert "model: [red]runs[/x]/tiny/model\n" in capsys.readouterr().out


# Permissions. (what may not be opened, what is said)

PERMISSIONS: list[tuple[str, int, str]] = [
    ("config.yaml", 0, "config.yaml: cannot be read: Permission denied"),
    ("train.jsonl", 0, "train.jsonl: cannot be read (Permission denied)"),
    ("model", 0, "model/adapter_config.json: cannot be read (Permission denied)"),
    ("model/config.json", 0, "model/config.json: cannot be read (Permission denied)"),
    ("model/tokenizer.json", 0, "model/tokenizer.json: cannot be read (Permission denied)"),
    ("model/model.safetensors", 0, "model/model.safetensors: cannot be read (Permission denied)"),
    ("runs", 0o500, "run.output_dir: runs/tiny cannot be written (Permission denied); choose a folder that can"),
]


@pytest.mark.parametrize(("name", "mode", "message"), PERMISSIONS)
def test_permissions(
    workspace: Workspace, name: str, mode: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()
    (workspace.root / "runs").mkdir()
    path = workspace.root / name
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with bound_by_permissions():
            check_refused(workspace, message, capsys)
    finally:
        path.chmod(before)


@pytest.mark.parametrize("path", ["data", "data/a.jsonl"])
def test_a_data_folder_that_may_not_be_entered(
    workspace: Workspace, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"data": {"train": {"path": path}}})
    (workspace.root / "data").mkdir(mode=0)
    with bound_by_permissions():
        check_refused(workspace, f"{path}: cannot be read (Permission denied)", capsys)


def test_a_fresh_name_in_a_folder_that_may_not_be_entered(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()
    (workspace.root / "runs").mkdir(mode=0)
    with bound_by_permissions():
        message = "run.output_dir: runs/tiny cannot be written (Permission denied); choose a folder that can"
        check_refused(workspace, message, capsys, "train", "config.yaml", "--fresh")
