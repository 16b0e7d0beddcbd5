"""Random edits of good configurations and data: what the user is told has a place, whatever was written."""

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.config.examples import VALID
from tests.tiny import byte_tokenizer
from tests.workspace import VAMO, base_config, merged
from vamo_ft.config.data import DataConfig
from vamo_ft.config.errors import ConfigError
from vamo_ft.config.load import load_config
from vamo_ft.core.errors import DataError
from vamo_ft.data.examples import Example
from vamo_ft.data.samples import load_evaluation

MANGLED = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=list(HealthCheck)
)
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# Configurations

FULL = merged(base_config(), {**VAMO, "model": {"adapter": {"type": "lora", "target_modules": ["q_proj"]}}})
ODD_TEXT = [
    "",
    " ",
    "\t",
    "0",
    "-1",
    "1e999",
    "9" * 400,
    ".inf",
    "null",
    "yes",
    "é",
    "😀",
    "\u2028",
    "a\nb",
    "{x}",
    "200 steps",
]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(ODD_TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "x", "type", "0"]), inner),
    max_leaves=6,
)
RAW = [
    "\t", "!!python/object/apply:os.system [true]", "!x 1", "&a [*a]", "&a {b: *a}", "*a", "<<: *a", "<<: 3", "? [a]",
    "- b", "[", "{", "'", '"', "|", "---", "...", "%YAML 9", "\0", "\x07", "\ufeff", '"\\ud800"', '"\\0"', "0: 1",
    "!!int x", "!!binary x", "!!timestamp 2001-01-01", "!!set {a}", "&a 1", "# x", "a: b: c", "\r", "\x85", "[" * 200,
]  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


PATHS = list(_paths(FULL))


@st.composite
def mangled_values(draw: st.DrawFn) -> str:
    """The full configuration with keys deleted, renamed, added and replaced."""
    values = json.loads(json.dumps(FULL))
    for _ in range(draw(st.integers(1, 4))):
        *parents, key = draw(st.sampled_from(PATHS))
        target: Any = values
        for parent in parents:
            target = target.get(str(parent)) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            continue
        match draw(st.sampled_from(["delete", "rename", "replace", "add"])):
            case "delete":
                target.pop(str(key), None)
            case "rename":
                target[draw(st.sampled_from(["nam", "steps", "é", "", "1", f"{key}s"]))] = target.pop(str(key), None)
            case "replace":
                target[str(key)] = draw(JUNK)
            case "add":
                target[draw(st.sampled_from(["name", "type", "eps", "every", "x"]))] = draw(JUNK)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=draw(st.booleans()))


@st.composite
def mangled_text(draw: st.DrawFn) -> str:
    """The text of a configuration with lines doubled, moved, dropped, and characters put in."""
    lines = yaml.safe_dump(FULL, sort_keys=False).splitlines() if draw(st.booleans()) else VALID.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["double", "drop", "indent", "append", "line", "cut", "value"])):
            case "double":
                lines.insert(draw(st.integers(0, len(lines))), lines[place])
            case "drop":
                lines[place] = ""
            case "indent":
                lines[place] = draw(st.sampled_from([" ", "\t", "   "])) + lines[place]
            case "append":
                lines[place] += draw(st.sampled_from([" ", "", "\n"])) + draw(st.sampled_from(RAW))
            case "line":
                lines.insert(place, draw(st.sampled_from(RAW)))
            case "cut":
                lines[place] = lines[place][: draw(st.integers(0, len(lines[place])))]
            case "value":
                lines[place] = lines[place].partition(":")[0] + ": " + draw(st.sampled_from(RAW + ODD_TEXT))
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines)


def _check_config(path: Path, content: bytes, overrides: list[str]) -> None:
    path.write_bytes(content)
    try:
        load_config(path, overrides=overrides)
    except ConfigError as error:
        for problem in error.problems:
            assert re.match(rf"({re.escape(str(path))}(:\d+)?|--set .*): \S", problem), problem
            assert "\n" not in problem
            assert "pydantic" not in problem and "Input should" not in problem, problem


@MANGLED
@given(text=mangled_values())
def test_mangled_values_are_valid_or_told_with_their_place(folder: Path, text: str) -> None:
    _check_config(folder / "values.yaml", text.encode(), [])


@MANGLED
@given(text=mangled_text())
def test_mangled_text_is_valid_or_told_with_its_place(folder: Path, text: str) -> None:
    _check_config(folder / "text.yaml", text.encode(), [])


@MANGLED
@given(
    key=st.sampled_from([".".join(map(str, path)) for path in PATHS] + ["", ".", "a b", "é", "run..name", "\udcff"]),
    value=st.sampled_from(RAW + ODD_TEXT) | st.text(max_size=5),
)
def test_mangled_overrides_are_valid_or_told_with_their_place(folder: Path, key: str, value: str) -> None:
    _check_config(folder / "override.yaml", VALID.encode(), [f"{key}={value}"])


@MANGLED
@given(content=st.binary(max_size=40))
def test_any_bytes_as_a_configuration(folder: Path, content: bytes) -> None:
    _check_config(folder / "bytes.yaml", content, [])


# Data

CLASSIFICATION = {"type": "classification", "template": "{text} It was", "labels": {"0": " bad", "1": " fine"}}
COMPLETION = {"type": "prompt_completion", "prompt": "{text}", "completion": " {label}"}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(),
    st.text(max_size=12),  # halves of surrogate pairs included
    st.sampled_from(
        ["0", "1", 0, 1, 1.0, "", " ", "\u2028", "\ud800", "a\r\nb", '"', "x" * 300, [], {}, [1], {"a": 1}]
    ),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "label", "é", ""]), VALUES, max_size=4), max_size=4)
GOOD = {"text": "good", "label": 1}


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _raw_json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig", "surrogatepass")


def _json_list(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["text", "label"])
    writer.writerows([[row.get("text"), row.get("label")] for row in rows])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    texts = [{name: None if value is None else repr(value) for name, value in row.items()} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(texts), sink)
    return sink.getvalue()


WRITERS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "lines": (".jsonl", _json_lines),
    "raw lines": (".jsonl", _raw_json_lines),
    "list": (".json", _json_list),
    "lines as .json": (".json", _json_lines),
    "csv": (".csv", _csv),
    "parquet": (".parquet", _parquet),
}


def _check_data(path: Path, content: bytes, *, format: dict[str, Any], task: Any) -> None:
    path.write_bytes(content)
    config = DataConfig.model_validate({"train": {"path": str(path)}, "format": format, "max_length": 40})
    try:
        samples = load_evaluation(config, config.train, TOKENIZER, task=task, position_ids=True, offline=True)
    except DataError as error:
        message = str(error)
        assert message.startswith(f"{path}:"), message
        message.encode()
        assert re.search(r":\d+: |: row \d+: |: element \d+: |: no rows|: no column|: holds one|Parquet", message), (
            message
        )
        return
    for index in range(samples.num_samples):
        example = samples.data[index]
        assert isinstance(example, Example)
        assert example.prompt_ids and len(example.prompt_ids) + len(example.completion_ids) <= 40


@pytest.mark.parametrize("kind", WRITERS)
@settings(MANGLED, max_examples=50)
@example(rows=[{"text": "x", "label": "\ud800"}], format=CLASSIFICATION, task="causal_lm")
@given(
    rows=ROWS,
    format=st.sampled_from([CLASSIFICATION, COMPLETION]),
    task=st.sampled_from(["causal_lm", "sequence_classification"]),
)
def test_mangled_rows_are_examples_or_told_with_file_and_row(
    folder: Path, kind: str, rows: list[dict[str, Any]], format: dict[str, Any], task: str
) -> None:
    suffix, write = WRITERS[kind]
    if format is COMPLETION:
        task = "causal_lm"
    try:
        content = write([GOOD, *rows])
    except UnicodeEncodeError:
        return  # Parquet has no way to write it
    _check_data(folder / f"rows{suffix}", content, format=format, task=task)


@pytest.mark.parametrize("kind", WRITERS)
@settings(MANGLED, max_examples=50)
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.sampled_from([0, 1, 3]), st.binary(max_size=3)), max_size=3))
def test_mangled_bytes_are_examples_or_told_with_file_and_row(
    folder: Path, kind: str, edits: list[tuple[int, int, bytes]]
) -> None:
    suffix, write = WRITERS[kind]
    content = write([GOOD, {"text": 'é "x",\n😀', "label": 0}, GOOD])
    for place, length, inserted in edits:
        at = place % (len(content) + 1)
        content = content[:at] + inserted + content[at + length :]
    _check_data(folder / f"bytes{suffix}", content, format=CLASSIFICATION, task="causal_lm")
