"""The table of bad inputs: each through the real command line, with exactly what is said of it and exit code 2.

Bad keys and values have a table of their own in tests/config/test_problems.py, folders in tests/test_bad_folders.py.
"""

from typing import Any

import pytest
from transformers import RwkvConfig, RwkvForCausalLM

from tests.refusals import check_refused
from tests.tiny import VOCABULARY, save_model_folder, write_jsonl
from tests.workspace import LORA, Workspace
from vamo_ft.cli import run

# Data files. (name, content, what is said)

ROW = b'{"sentence": "a", "label": 0}\n'
NUL = "holds a NUL byte, so it is not a text file, or in UTF-16; save it as UTF-8"
HALF = r"\ud800 alone is half of a character; write both halves, or the character"
FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", "a.jsonl: no rows"),
    ("a.jsonl", b"\r\n \n", "a.jsonl: no rows"),
    ("a.csv", b"", "a.csv: no rows"),
    ("a.csv", b"sentence,label\n", "a.csv: no rows"),
    ("a.json", b"[]", "a.json: no rows"),
    ("a.jsonl", ROW + b'{"sentence": \n', "a.jsonl:2: not valid JSON (Expecting value)"),
    ("a.jsonl", ROW + b"[1]\n", "a.jsonl:2: not a JSON object; write one object with the columns as keys"),
    ("a.json", b'{\n"data": [\n1]}', "a.json: holds one JSON object; write a list of objects, or one object a line"),
    ("a.json", b'[\n{"x": 1},\n{"x" 2}]', "a.json:3: not valid JSON (Expecting ':' delimiter)"),
    # encodings
    ("a.jsonl", ROW + b'{"sentence": "\xe9"}', "a.jsonl:2: not UTF-8 (byte 15 of the line); save the file as UTF-8"),
    ("a.csv", b"sentence,label\n\xe9,0\n", "a.csv:2: not UTF-8 (byte 1 of the line); save the file as UTF-8"),
    ("a.jsonl", ROW.decode().encode("utf-16"), "a.jsonl:1: not UTF-8 (byte 1 of the line); save the file as UTF-8"),
    ("a.jsonl", ROW.decode().encode("utf-16-le"), f"a.jsonl:1: {NUL}"),
    ("a.jsonl", ROW + b'{"sentence": "a\0b", "label": 0}\n', f"a.jsonl:2: {NUL}"),
    ("a.csv", b"sentence,label\na\0b,0\n", f"a.csv:2: {NUL}"),
    ("a.jsonl", ROW + b'{"sentence": "a\\ud800b", "label": 0}\n', f"a.jsonl:2: {HALF}"),
    ("a.jsonl", ROW + b'{"sentence": "ab", "label": "\\uD800"}\n', f"a.jsonl:2: {HALF}"),
    ("a.jsonl", b'{"\\ud800": "ab"}\n', f"a.jsonl:1: {HALF}"),
    ("a.json", b'[{"x": 1}, {"sentence": ["\\ud800"]}]', f"a.json: element 2: {HALF}"),
    # columns, labels, values
    (
        "a.jsonl",
        b'{"text": "a", "label": 0}\n',
        "a.jsonl: no column 'sentence' (data.format.template); the columns are text, label",
    ),
    ("a.jsonl", ROW + b'{"label": 0}\n', "a.jsonl: row 2: column 'sentence' is missing"),
    ("a.jsonl", ROW + b'{"sentence": null, "label": 0}', "a.jsonl: row 2: column 'sentence' is null"),
    ("a.jsonl", b'{"sentence": "a"}', "a.jsonl: no column 'label' (data.format.label); the columns are sentence"),
    (
        "a.jsonl",
        ROW + b'{"sentence": "a", "label": 7}',
        "a.jsonl: row 2: label '7' is not among data.format.labels (0, 1)",
    ),
    (
        "a.jsonl",
        b'{"sentence": "a", "label": "' + b"x" * 100 + b'"}',
        f"a.jsonl: row 1: label '{'x' * 60}...' is not among data.format.labels (0, 1)",
    ),
    (
        "a.jsonl",
        b'{"sentence": "a", "label": "a\\n\\u001b[2J"}',  # a terminal would clear its screen
        r"a.jsonl: row 1: label 'a \x1b[2J' is not among data.format.labels (0, 1)",
    ),
    (
        "a.jsonl",
        b'{"sentence": "a", "label": [1]}',
        "a.jsonl: row 1: column 'label' holds a list; use text, a number, true or false",
    ),
    # tables
    ("a.csv", b"sentence,label\na,0\nb\n", "a.csv:3: 1 fields; the header has 2"),
    ("a.csv", b'sentence,label\n"a\nb",0\n"c\nd"\n', "a.csv:4: 1 fields; the header has 2"),
    ("a.csv", b"label,label\n0,0\n", "a.csv:1: a column name occurs twice in the header: label, label"),
    (
        "a.csv",
        b'sentence,label\na,0\n"b,1\nc,0\n',
        "a.csv:3: not valid CSV (a quoted field of this row is never closed)",
    ),
    (
        "a.csv",
        b"sentence,label\ra,0\r",
        "a.csv:1: not valid CSV (a carriage return outside of quotes; end lines with line feeds)",
    ),
    ("a.parquet", b"", "a.parquet: not a valid Parquet file (Parquet file size is 0 bytes)"),
    (
        "a.parquet",
        b"sentence,label\na,0\n",
        "a.parquet: not a valid Parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or "
        "this is not a parquet file.)",
    ),
    ("a.txt", b"x", "a.txt: unknown suffix '.txt'; use .jsonl, .json, .csv or .parquet"),
    ("a.jsonl.gz", b"x", "a.jsonl.gz: unknown suffix '.gz'; use .jsonl, .json, .csv or .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_data_files(
    workspace: Workspace, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace.root / name).write_bytes(content)
    workspace.configure({"data": {"train": {"path": name}}})
    check_refused(workspace, message, capsys)


LONG = "x" * 10_000_000
GOOD_FILES: list[tuple[str, bytes]] = [
    ("bom and crlf.jsonl", b'\xef\xbb\xbf{"sentence": "a", "label": 0}\r\n\r\n{"sentence": "b", "label": 1}\r\n'),
    ("bom and crlf.json", b'\xef\xbb\xbf[\r\n{"sentence": "a", "label": 0}]'),
    ("bom and crlf.csv", b'\xef\xbb\xbfsentence,label\r\n"a ""q"",\r\nb",0\r\nc,1\r\n'),
    ("emoji.jsonl", '{"sentence": "\\ud83d\\ude00 😀\u2028", "label": 0}'.encode()),
    ("emoji.csv", "sentence,label\n😀,0\n".encode()),
    ("escaped nul.jsonl", b'{"sentence": "a\\u0000b", "label": 0}'),
    ("empty text.jsonl", b'{"sentence": "", "label": 0}'),
    ("long line.jsonl", f'{{"sentence": "a", "label": 0, "note": "{LONG}"}}'.encode()),
    ("long line.csv", f"sentence,label,note\na,0,{LONG}\n".encode()),
]


@pytest.mark.parametrize(("name", "content"), GOOD_FILES, ids=[name for name, _ in GOOD_FILES])
def test_what_is_unusual_and_just_works(workspace: Workspace, name: str, content: bytes) -> None:
    (workspace.root / name).write_bytes(content)
    workspace.configure({"data": {"train": {"path": name}}, "training": {"steps": 1}})
    assert workspace.train() == 0


# What the configuration names, and does not fit. (what is changed in it, what is said)

LAYERS = "its layers are embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
NOT_LOCAL = "no file or folder here, and not in the cache of Hub data sets"
CHANGES: list[tuple[dict[str, Any], str]] = [
    (
        {"data": {"train": {"path": "trian.jsonl"}}},
        "trian.jsonl: no such file or folder; {root} has train.jsonl, eval.jsonl",
    ),
    (
        {"data": {"evaluation": {"path": "no/dev.jsonl"}}},
        "no/dev.jsonl: no such file or folder; there is no folder no",
    ),
    (
        {"data": {"train": {"path": "nobody/nothing"}}},
        f"nobody/nothing: {NOT_LOCAL}; Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)",
    ),
    (
        {"run": {"offline": True}, "data": {"train": {"path": "nobody/nothing"}}},
        f"nobody/nothing: {NOT_LOCAL}; run.offline forbids a download",
    ),
    (
        {"data": {"train": {"path": "x" * 300 + ".jsonl"}}},
        f"{'x' * 300}.jsonl: cannot be read (File name too long)",
    ),
    (
        {"data": {"train": {"path": "train.jsonl", "revision": "v1"}}},
        "train.jsonl: a local file has no revision; leave it out",
    ),
    (
        {"data": {"format": {"template": "{sentence It"}}},
        "data.format.template: '{' at character 1 is not part of a '{column}'; write '{{' for the character itself",
    ),
    (
        {"data": {"format": {"template": "{sentence.__class__}"}}},
        "train.jsonl: no column 'sentence.__class__' (data.format.template); the columns are sentence, label",
    ),
    ({"data": {"format": {"labels": {0: "", 1: " x"}}}}, "data.format.labels.0: the text '' has no tokens"),
    (
        {"data": {"max_length": 2}},
        "train.jsonl: row 1: a completion of 5 tokens leaves no room for the prompt within data.max_length 2; raise "
        "it, or shorten the row",
    ),
    ({"model": {"path": "./no"}}, "model.path: ./no: there is no such folder, and it is not a Hub id"),
    ({"model": {"path": "x" * 300}}, f"model.path: {'x' * 300}: there is no such folder, and it is not a Hub id"),
    (
        {"model": {"path": "train.jsonl"}},
        "model.path: train.jsonl: is a file; write the model's folder, or a .gguf file",
    ),
    (
        {"model": {"path": "nobody/nothing"}},
        "model.path: nobody/nothing: there is no such folder, and the Hub does not give it: We couldn't connect to "
        "'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
    ),
    (
        {"run": {"offline": True}, "model": {"path": "nobody/nothing"}},
        "model.path: nobody/nothing: is not in the Hugging Face cache, and run.offline is true; download it once with "
        "run.offline: false",
    ),
    ({"model": {"revision": "v1"}}, "model.revision: model is a local folder, which has none; leave it out"),
    (
        {"model": {"adapter": {**LORA, "target_modules": ["query"]}}},
        f"model.adapter.target_modules: 'query' matches no layer of the model; {LAYERS}",
    ),
    (
        {"model": {"adapter": {**LORA, "target_modules": []}}},
        "config.yaml:10: model.adapter.target_modules: names no layer; write the names of some, or all-linear",
    ),
    (
        {"model": {"adapter": {**LORA, "modules_to_save": ["head"]}}},
        f"model.adapter.modules_to_save: 'head' matches no layer of the model; {LAYERS}",
    ),
    (
        {"model": {"freeze": ["*query*"]}},
        "model.freeze: '*query*' matches no parameter; there are 21, such as model.embed_tokens.weight, "
        "model.layers.1.self_attn.q_proj.weight, lm_head.weight",
    ),
    ({"model": {"freeze": ["*"]}}, "model.freeze: nothing is left to train; remove a pattern"),
    (
        {"run": {"output_dir": "train.jsonl"}},
        "run.output_dir: train.jsonl/tiny cannot be written (Not a directory); choose a folder that can",
    ),
    ({"run": {"output_dir": ""}}, "config.yaml:4: run.output_dir: must be text that is not empty, not ''"),
    (
        {"run": {"output_dir": "a\0b"}},
        "config.yaml:4: run.output_dir: holds a NUL character or half of a surrogate pair, which are not text",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_configurations_that_do_not_fit(
    workspace: Workspace, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(change)
    check_refused(workspace, message, capsys)


PAIRS = ["data.format={type: prompt_completion}", "evaluation.metrics=[loss]", "data.evaluation.path=train.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "b", "completion": " \n"},
            "train.jsonl: row 2: the completion is empty, so there is nothing to learn; remove the row",
        ),
        (
            {"prompt": "b", "completion": "x" * 48},
            "train.jsonl: row 2: a completion of 49 tokens leaves no room for the prompt within data.max_length 48; "
            "raise it, or shorten the row",
        ),
        ({"prompt": "b"}, "train.jsonl: row 2: column 'completion' is missing"),
    ],
)
def test_examples_without_supervision(
    workspace: Workspace, row: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(workspace.root / "train.jsonl", [{"prompt": "a", "completion": "b"}, row])
    changes = [argument for change in PAIRS for argument in ("--set", change)]
    check_refused(workspace, message, capsys, "train", workspace.configure(), *changes)


def test_a_model_that_reads_padding(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, pad_token_id=0))
    save_model_folder(workspace.root / "model", model)
    message = (
        "model.path: model: this model (RwkvForCausalLM) does not leave the padding in front of a row out, so that "
        "losses would depend on what else is in the batch; choose another model"
    )
    check_refused(workspace, message, capsys, "train", workspace.configure())


COMMANDS: list[tuple[list[str], str]] = [
    (["train", "gone.yaml"], "gone.yaml: no such file; 'vamo-ft init' writes one to start from"),
    (["train", "model"], "model: this is a folder; name the configuration file"),
    (["train", "\udcff.yaml"], r"\udcff.yaml: no such file; 'vamo-ft init' writes one to start from"),
    (["train", "config.yaml", "--set", "abc"], "--set abc: write it as key=value, such as method.probes=4"),
    (["train", "config.yaml", "--set", "\udcff=1"], r"--set \udcff=1: write it as key=value, such as method.probes=4"),
    (
        ["train", "config.yaml", "--set", "run.name=\udcff"],
        r"--set run.name: the character '\udcff' is not allowed in YAML",
    ),
    (
        ["train", "config.yaml", "--resume", "no"],
        "--resume no: not a checkpoint of this run; they are in runs/tiny/checkpoints",
    ),
    (["evaluate", "no"], "no: no such folder; name a run directory or a checkpoint in one"),
    (["evaluate", "model"], "model: neither a run directory nor a checkpoint in one"),
    (["init", "--out", "no/x.yaml"], "no/x.yaml: cannot be written: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS)
def test_arguments(
    workspace: Workspace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure()
    check_refused(workspace, message, capsys, *arguments)


CONFIGURATIONS: list[tuple[bytes, str]] = [
    (b"", "config.yaml: the file is empty; 'vamo-ft init' writes one to start from"),
    (b"- a", "config.yaml: must hold sections such as 'run:' and 'model:' at the top"),
    ("a: é".encode("latin-1"), "config.yaml:1: not UTF-8 text; save the file as UTF-8"),
    ("a: é".encode("utf-16"), "config.yaml:1: not UTF-8 text; save the file as UTF-8"),
    (b"a: 1\nb: \0", r"config.yaml:2: the character '\x00' is not allowed in YAML"),
    (
        b"\ta: 1",
        r"config.yaml:1: not valid YAML: while scanning for the next token, found character '\t' that cannot "
        "start any token",
    ),
]


@pytest.mark.parametrize(("content", "message"), CONFIGURATIONS)
def test_files_that_are_no_configuration(
    workspace: Workspace, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace.root / "config.yaml").write_bytes(content)
    check_refused(workspace, message, capsys)


def test_a_configuration_with_bom_and_crlf(workspace: Workspace) -> None:
    path = workspace.root / workspace.configure()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert run(["validate", "config.yaml"]) == 0
