import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vamo_ft.commands.data_format import format_of
from vamo_ft.config.data import ClassificationFormat, DataSetConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.data.formatting import format_rows
from vamo_ft.data.rows import Rows
from vamo_ft.data.sources import load_rows
from vamo_ft.data.values import label_key

LABELLED = [{"id": 1, "sentence": "a joy", "label": 1}, {"id": 2, "sentence": "a bore", "label": 0}]
SENTIMENT = {
    "type": "classification",
    "template": "{sentence}\nLabel:",
    "label": "label",
    "labels": {"0": " 0", "1": " 1"},
}


def written(path: Path, rows: list[Any]) -> str:
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            path.write_text("\n".join(",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]))
        case _:
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    assert format_of(written(tmp_path / f"rows{suffix}", LABELLED)) == SENTIMENT
    assert format_of(str(tmp_path)) == SENTIMENT, "the folder of the file"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, {"type": "chat", "messages": "messages"}),
        ({"conversations": [{"from": "human", "value": "hi"}]}, {"type": "chat", "messages": "conversations"}),
        (
            {"completion": "b", "prompt": "a", "text": "ab"},
            {"type": "prompt_completion", "prompt": "{prompt}", "completion": "{completion}"},
        ),
        (
            {"instruction": "a", "input": "", "output": "b"},
            {"type": "prompt_completion", "prompt": "{instruction}\n{input}\n", "completion": "{output}"},
        ),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "d"},
            {"type": "prompt_completion", "prompt": "{instruction}\n{context}\n", "completion": "{response}"},
        ),
        (
            {"instruction": "a", "input": None, "output": "b"},
            {"type": "prompt_completion", "prompt": "{instruction}\n", "completion": "{output}"},
        ),
        (
            {"input": "a", "output": "b"},
            {"type": "prompt_completion", "prompt": "{input}\n", "completion": "{output}"},
        ),
        (
            {"prompt": "a", "context": "c", "completion": "b"},
            {"type": "prompt_completion", "prompt": "{prompt}", "completion": "{completion}"},
        ),
        ({"text": "a"}, {"type": "text", "column": "text"}),
    ],
)
def test_columns_tell_the_format(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert format_of(written(tmp_path / "rows.jsonl", [row])) == expected


def test_labels_of_other_types(tmp_path: Path) -> None:
    rows = [{"text": "a", "topic": value} for value in (True, False, True, None)]
    section = format_of(written(tmp_path / "rows.jsonl", rows))
    assert section["labels"] == {"false": " false", "true": " true"}
    assert section["template"] == "{text}\nTopic:"


@pytest.mark.parametrize(("values", "named"), [([0.0, 1.0, 1.0], ["0", "1"]), ([0.5, 1.0, float("nan")], ["0.5", "1"])])
def test_numbers_are_named_as_the_data_is_read(tmp_path: Path, values: list[float], named: list[str]) -> None:
    path = written(tmp_path / "rows.parquet", [{"text": "a", "label": value} for value in values])
    section = format_of(path)
    assert list(section["labels"]) == named
    rows = [row for row in load_rows(DataSetConfig(path=path), offline=True).rows if row["label"] == row["label"]]
    config = ClassificationFormat.model_validate(section)
    examples = list(format_rows(Rows(path, ("text", "label"), rows), config))
    assert [config.classes[example.label or 0] for example in examples] == [label_key(row["label"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1, "b": 2}', r"the columns \(a, b\) tell no format"),
        ("a.jsonl", "", r"the columns \(none\) tell no format"),
        ("a.jsonl", "[1]", r"the columns \(none\) tell no format"),
        ("a.json", '{"text": "a"}', r"the columns \(none\) tell no format"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}',
            r"a\.jsonl: column 'label' has 1 different value in the first 1 row, and a classification is written for "
            "2 to 20; leave --data out, and write data.train.path and data.format in the new file$",
        ),
        (
            "a.csv",
            "text,label\n" + "".join(f"a,{number}\n" for number in range(2500)),
            "column 'label' has 2,000 different values in the first 2,000 rows, and a",
        ),
        ("a.jsonl", '{"messages": "text"}', "tell no format"),
        ("a.jsonl", '{"text', r"a\.jsonl: cannot be read \(Unterminated string"),
        ("a.jsonl", "\udcff", r"a\.jsonl: cannot be read \("),
        ("a.parquet", "no", r"a\.parquet: cannot be read \("),
        ("a.txt", "text", r"is none of \.jsonl, \.json, \.csv, \.parquet$"),
        (None, "", "there is no such file; for a data set of the Hub"),
    ],
)
def test_what_tells_nothing_is_refused(tmp_path: Path, name: str | None, content: str, message: str) -> None:
    path = tmp_path / (name or "gone.jsonl")
    if name is not None:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UsageError, match=message):
        format_of(str(path))
