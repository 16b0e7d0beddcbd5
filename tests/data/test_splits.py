"""Parts of splits of local data, and columns under other names."""

import re
from pathlib import Path

import pytest

from tests.tiny import write_jsonl
from vamo_ft.config.data import DataSetConfig
from vamo_ft.core.errors import DataError
from vamo_ft.data.places import row_places, sample_places
from vamo_ft.data.rows import Rows, rename_columns
from vamo_ft.data.sources import load_rows

NUMBERS = [{"x": number} for number in range(10)]


def numbers(path: Path, **keys: object) -> list[int]:
    return [row["x"] for row in load_rows(DataSetConfig(path=str(path), **keys), offline=True).rows]


PARTS = {
    "train": list(range(10)),
    "train[:3]": [0, 1, 2],
    "train[-2:]": [8, 9],
    "train[20%:40%]": [2, 3],
    "train[:1]+train[9:]": [0, 9],
}


@pytest.mark.parametrize("split", PARTS)
def test_parts_of_a_file(tmp_path: Path, split: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", NUMBERS)
    assert numbers(path, split=split) == PARTS[split]
    assert numbers(path, split=split, limit=1) == PARTS[split][:1]
    config = DataSetConfig(path=str(path), split=split)
    indices = list(range(len(PARTS[split])))
    assert row_places(config, indices) == [f"{path}:{number + 1}" for number in PARTS[split]]
    assert row_places(config, indices[::-1]) == [f"{path}:{number + 1}" for number in PARTS[split][::-1]]


def test_parts_of_the_splits_of_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-0.jsonl", NUMBERS[:4])
    write_jsonl(tmp_path / "train-1.jsonl", NUMBERS[4:])
    write_jsonl(tmp_path / "validation.jsonl", [{"x": 77}])
    assert numbers(tmp_path, split="train[3:6]") == [3, 4, 5]
    assert numbers(tmp_path, split="validation+train[:1]") == [77, 0]
    assert row_places(DataSetConfig(path=str(tmp_path), split="validation+train[4:5]"), [1, 0]) == [
        f"{tmp_path}/train-1.jsonl:1",
        f"{tmp_path}/validation.jsonl:1",
    ]
    with pytest.raises(DataError, match=r"no file of split 'test'"):
        numbers(tmp_path, split="train+test[:3]")


def test_rows_of_a_part_are_numbered_within_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", NUMBERS)
    assert load_rows(DataSetConfig(path=str(path), split="train[5:]"), offline=True).place == f"{path} (train[5:])"
    with pytest.raises(DataError, match=re.escape(f"{path} (train[10:]): no rows")):
        numbers(path, split="train[10:]")


@pytest.mark.parametrize("split", ["train[1", "train[a:b]", "train[:200%]", "train[::2]", "train+"])
def test_what_is_no_part_of_a_split_is_told(tmp_path: Path, split: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", NUMBERS)
    with pytest.raises(
        DataError, match=r"rows\.jsonl: (split: '.*' cannot be taken|a local file has no split)"
    ) as told:
        numbers(path, split=split)
    assert "\n" not in str(told.value)


def test_a_file_is_the_split_train(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", NUMBERS)
    with pytest.raises(DataError, match=r"a local file has no split 'dev'; it is the split 'train', or leave split"):
        numbers(path, split="dev[:3]")


def test_places_of_several_data_sets(tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", NUMBERS), write_jsonl(tmp_path / "b.jsonl", NUMBERS)
    sets = [
        DataSetConfig(path=str(a), limit=3),
        DataSetConfig(path="owner/name"),
        DataSetConfig(path=str(b), split="train[5:]"),
    ]
    assert sample_places(sets, [(2, (3,)), (0, (0,)), (1, (1,)), (0, (2, 0, 2)), (2, (0, 1))]) == [
        [f"{b}:9"],
        [f"{a}:1"],
        ["owner/name, row 2"],
        [f"{a}:3", f"{a}:1", f"{a}:3"],
        [f"{b}:6", f"{b}:7"],
    ]


ROWS = Rows("here", ("text", "label", "id"), [{"text": "a", "label": 1, "id": 7}, {"label": 2}])


def test_columns_get_other_names() -> None:
    renamed = rename_columns(ROWS, {"sentence": "text", "again": "text", "id": "label"})
    assert set(renamed.columns) == {"sentence", "again", "id"}
    assert [dict(row) for row in renamed.rows] == [{"sentence": "a", "again": "a", "id": 1}, {"id": 2}]
    assert renamed.rows[-1] == {"id": 2}
    assert renamed.rows[:1] == [{"sentence": "a", "again": "a", "id": 1}]
    assert len(renamed) == 2
    swapped = rename_columns(ROWS, {"text": "label", "label": "text"})
    assert dict(swapped.rows[0]) == {"text": 1, "label": "a", "id": 7}
    assert rename_columns(ROWS, {}) is ROWS


def test_a_missing_column_names_those_there_are() -> None:
    with pytest.raises(
        DataError, match=r"^here: no column 'txt' \(columns\.sentence\); the columns are text, label, id"
    ):
        rename_columns(ROWS, {"sentence": "txt"})
