import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.tiny import write_jsonl
from vamo_ft.config.data import DataSetConfig
from vamo_ft.core.errors import DataError
from vamo_ft.data.sources import load_rows


def rows_of(path: Path | str, **keys: object) -> list[dict]:
    return [dict(row) for row in load_rows(DataSetConfig(path=str(path), **keys), offline=True).rows]


ROWS = [{"text": "a", "label": 1}, {"text": "b\u2028c é", "label": 0}]


def write_parquet(path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "raw.jsonl": lambda path: path.write_text(
        "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8"
    ),
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_reads_every_kind(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert rows_of(tmp_path / name) == ROWS
    assert rows_of(tmp_path / name, limit=1) == ROWS[:1]


def test_csv_values_stay_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\r\n"a, ""b""\nc",01\n,1.0\n', encoding="utf-8")
    assert rows_of(path) == [{"text": 'a, "b"\nc', "label": "01"}, {"text": "", "label": "1.0"}]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'x' * 200_000}\n")
    assert len(rows_of(path)[0]["text"]) == 200_000


def test_json_values_of_mixed_types_stay_as_they_were_written(tmp_path: Path) -> None:
    mixed = [{"label": 1}, {"label": "1"}, {"label": 1.0, "extra": None}, {"label": True}]
    rows = load_rows(DataSetConfig(path=str(write_jsonl(tmp_path / "a.jsonl", mixed))), offline=True)
    assert [repr(row) for row in rows.rows] == [repr(row) for row in mixed]
    assert rows.columns == ("label", "extra")


def test_an_edited_file_gives_its_new_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    times = (path.stat().st_atime, path.stat().st_mtime)
    assert rows_of(path) == [{"x": 1}]
    write_jsonl(path, [{"x": 2}])
    os.utime(path, times)  # the same size and time
    assert rows_of(path) == [{"x": 2}]


def test_folder_takes_the_files_of_one_split_in_order(tmp_path: Path) -> None:
    for name in ("train-1", "train-0", "dev", "trainee"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"x": name}])
    (tmp_path / "README.md").write_text("not data")
    assert [row["x"] for row in rows_of(tmp_path)] == ["train-0", "train-1"]
    assert [row["x"] for row in rows_of(tmp_path, split="dev")] == ["dev"]


def test_folder_without_split_names_is_read_whole(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"x": name}])
    assert [row["x"] for row in rows_of(tmp_path)] == ["a", "b"]
    assert [row["x"] for row in rows_of(tmp_path, limit=1)] == ["a"]


BAD_FILES = [
    ("a.jsonl", b'{"x": 1}\n\n{"x": \n', r"a\.jsonl:3: not valid JSON \(Expecting value\)"),
    ("a.jsonl", b'{"x": 1}\n[1]\n', r"a\.jsonl:2: not a JSON object; write one object"),
    ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', r"a\.jsonl:2: not UTF-8 \(byte 8 of the line\)"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON \(maximum recursion"),
    ("a.jsonl", b'{"x": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not valid JSON \(Exceeds"),
    ("a.jsonl", b"\n", r"a\.jsonl: no rows"),
    ("a.json", b'[\n{"x": 1},\n{"x" 2}]', r"a\.json:3: not valid JSON \(Expecting ':' delimiter\)"),
    ("a.json", b'[{"x": 1}, 2]', r"a\.json: element 2: not a JSON object"),
    ("a.json", b"[]", r"a\.json: no rows"),
    ("a.csv", b"x,y\n1,2\n3\n", r"a\.csv:3: 1 fields; the header has 2"),
    ("a.csv", b"x,x\n1,2\n", r"a\.csv:1: a column name occurs twice in the header: x, x"),
    ("a.csv", b'x,y\n1,"2"3\n', r"a\.csv:2: not valid CSV \(.*expected after"),
    ("a.csv", b"x\n1\n\xe9\n", r"a\.csv:3: not UTF-8"),
    ("a.csv", b"x\n", r"a\.csv: no rows"),
    ("a.csv", b"", r"a\.csv: no rows"),
    ("a.parquet", b"PAR1 nothing", r"a\.parquet: not a valid Parquet file \("),
    ("a.txt", b"x", r"a\.txt: unknown suffix '\.txt'; use \.jsonl, \.json, \.csv or \.parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_file_lists_what_the_folder_has(tmp_path: Path) -> None:
    for name in ("train.jsonl", "other.csv", "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file or folder; .* has train\.jsonl$"):
        rows_of(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"has other\.csv, train\.jsonl$"):
        rows_of(tmp_path / "zzz.json")
    with pytest.raises(DataError, match=rf"there is no folder {tmp_path}/nowhere$"):
        rows_of(tmp_path / "nowhere" / "train.jsonl")


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder has no \.jsonl, \.json, \.csv or \.parquet file"):
        rows_of(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    with pytest.raises(DataError, match=r"no file of split 'test'; the folder has a\.jsonl"):
        rows_of(tmp_path, split="test")
    (tmp_path / "b.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"files of several kinds \(a\.jsonl, b\.csv\)"):
        rows_of(tmp_path)


@pytest.mark.parametrize("key", ["name", "revision"])
def test_keys_of_the_hub_are_refused_for_a_file(tmp_path: Path, key: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    with pytest.raises(DataError, match=rf"a local file has no {key}; leave it out"):
        rows_of(path, **{key: "main"})


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])

    def refuse(self: Path, _: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
        rows_of(path)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub data set `owner/words` as an earlier download leaves it."""
    built = tmp_path / "built"
    source = write_jsonl(tmp_path / "words.jsonl", ROWS)
    datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(built))
    arrow = next(built.rglob("*.arrow"))
    target = tmp_path / "cache" / "owner___words" / "default" / "0.0.0" / COMMIT
    target.mkdir(parents=True)
    shutil.copy(arrow, target / "words-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": "words"}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("hub_cache")
def test_offline_hub_data_set_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    load_dataset = datasets.load_dataset

    def load_dataset_offline(*args: Any, **keys: Any) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        return load_dataset(*args, **keys)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset_offline)
    assert rows_of("owner/words") == ROWS
    assert rows_of("owner/words", limit=1, revision=COMMIT) == ROWS[:1]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("hub_cache")
def test_offline_hub_data_set_refuses_what_the_cache_lacks() -> None:
    with pytest.raises(DataError, match=rf"owner/words: offline, revision 'v2' is not the cached commit {COMMIT}"):
        rows_of("owner/words", revision="v2")
    with pytest.raises(DataError, match=r"owner/words: cannot be loaded from the Hub \(Unknown split \"test\""):
        rows_of("owner/words", split="test")
    with pytest.raises(DataError, match=r"^owner/verbs: no file or folder here, and not in .*run\.offline forbids"):
        rows_of("owner/verbs")


@pytest.mark.usefixtures("hub_cache")
def test_parts_of_splits_of_a_hub_data_set() -> None:
    assert rows_of("owner/words", split="train[1:]") == ROWS[1:]
    assert rows_of("owner/words", split="train[:50%]") == ROWS[:1]
    assert rows_of("owner/words", split="train[1:]+train[:1]") == ROWS[::-1]
    assert rows_of("owner/words", split="train", columns={"sentence": "text"}) == [
        {"sentence": row["text"], "label": row["label"]} for row in ROWS
    ]
    with pytest.raises(DataError, match=r"owner/words: cannot be loaded from the Hub \("):
        rows_of("owner/words", split="train[1")


@pytest.mark.usefixtures("hub_cache")
def test_the_library_names_the_content_of_a_hub_data_set() -> None:
    prints = [
        load_rows(DataSetConfig(path="owner/words", **keys), offline=True).content_hash(lambda: False)
        for keys in ({}, {"limit": 1}, {"limit": 2}, {}, {"split": "train[1:]"})
    ]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3 + (prints[2] != prints[0])


def test_a_stream_takes_its_first_rows_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own stream over local files stands for that of the Hub; the last line would be an error."""
    files = [write_jsonl(tmp_path / f"{number}.jsonl", [{"x": number, "y": None}]) for number in range(3)]
    (tmp_path / "3.jsonl").write_text("{never read")
    load_dataset, asked = datasets.load_dataset, []

    def from_files(path: str, name: str | None, **keys: Any) -> Any:
        asked.append((path, name, keys.pop("revision"), keys["split"], keys["streaming"]))
        return load_dataset("json", data_files=[*map(str, files), str(tmp_path / "3.jsonl")], **keys)

    monkeypatch.setattr(datasets, "load_dataset", from_files)
    config = DataSetConfig(path="owner/words", name="en", revision="v1", streaming=True, limit=2)
    rows = load_rows(config, offline=False)
    assert [dict(row) for row in rows.rows] == [{"x": 0, "y": None}, {"x": 1, "y": None}]
    assert rows.columns == ("x", "y")
    assert asked == [("owner/words", "en", "v1", "train", True)]
    other = load_rows(config.model_copy(update={"limit": 1}), offline=False)
    assert rows.content_hash(lambda: False) != other.content_hash(lambda: False)
    with pytest.raises(DataError, match=r"owner/words: run\.offline forbids streaming; leave it out to take"):
        load_rows(config, offline=True)
    with pytest.raises(DataError, match=r"owner/words: cannot be loaded from the Hub \("):
        load_rows(config.model_copy(update={"limit": 4}), offline=False)
