from typing import Any

import pytest

from vamo_ft.config.data import ClassificationFormat, PromptCompletionFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.formatting import TextExample, format_rows
from vamo_ft.data.rows import Rows


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows("data/train.jsonl", tuple(dict.fromkeys(name for row in rows for name in row)), rows)


def classify(*rows: dict[str, Any], template: str = "{text} It was", labels: dict | None = None) -> list[TextExample]:
    config = ClassificationFormat(
        type="classification", template=template, labels=labels or {"0": " terrible", "1": " great"}
    )
    return list(format_rows(rows_of(*rows), config))


def test_classification() -> None:
    assert classify({"text": "fine", "label": 1}, {"text": "dull", "label": 0}) == [
        TextExample("fine It was", " great", 1),
        TextExample("dull It was", " terrible", 0),
    ]


@pytest.mark.parametrize(
    ("value", "labels", "expected"),
    [
        (1, {"0": "a", "1": "b"}, 1),
        (1.0, {"0": "a", "1": "b"}, 1),
        ("1", {0: "a", 1: "b"}, 1),
        (True, {False: "a", True: "b"}, 1),
        (False, {"true": "a", "false": "b"}, 1),
        ("True", {"true": "a", "no": "b"}, 0),
        (0.5, {"0.5": "a", "1": "b"}, 0),
        ("no", {"yes": "a", "no": "b"}, 1),
    ],
)
def test_labels_are_compared_as_text(value: object, labels: dict, expected: int) -> None:
    [example] = classify({"text": "x", "label": value}, labels=labels)
    assert example.label == expected
    assert example.completion == list(labels.values())[expected]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text}", "v"),
        ("{{text}} {text}", "{text} v"),
        ("{{{text}}}", "{v}"),
        ("{a.b}{a[0]} {n!r} {n:>9}", "12 3 4"),
        ("{count} {ratio} {flag}", "7 1.0 true"),
    ],
)
def test_templates_fill_in_columns_and_nothing_else(template: str, expected: str) -> None:
    row = {"text": "v", "label": 0, "a.b": 1, "a[0]": 2, "n!r": 3, "n:>9": 4, "count": 7, "ratio": 1.0, "flag": True}
    assert classify(row, template=template)[0].prompt == expected


def test_values_are_not_templates() -> None:
    assert classify({"text": "{label}", "label": 0})[0].prompt == "{label} It was"


def test_prompt_completion() -> None:
    config = PromptCompletionFormat(type="prompt_completion", prompt="Q: {q}\n", completion=" {a}")
    examples = list(format_rows(rows_of({"q": "1+1", "a": 2}), config))
    assert examples == [TextExample("Q: 1+1\n", " 2", None)]


@pytest.mark.parametrize("template", ["{text} {", "text}", "{}", "{text}}", "{a{b}"])
def test_malformed_templates(template: str) -> None:
    with pytest.raises(
        DataError, match=r"^data\.format\.template: '[{}]' at character \d+ is not part of a '{column}'"
    ):
        classify({"text": "x", "label": 0}, template=template)


GOOD = {"text": "x", "label": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, r"row 2: column 'text' is missing"),
        ({"text": None, "label": 0}, r"row 2: column 'text' is null"),
        ({"text": float("nan"), "label": 0}, r"row 2: column 'text' is null"),
        ({"text": "x", "label": None}, r"row 2: column 'label' is null"),
        ({"text": ["x"], "label": 0}, r"row 2: column 'text' holds a list; use text, a number, true or false"),
        ({"text": "a\ud800", "label": 0}, r"row 2: column 'text' is not valid Unicode at character 2"),
        ({"text": "x", "label": 2}, r"row 2: label '2' is not among data\.format\.labels \(0, 1\)"),
        ({"text": "x", "label": {}}, r"row 2: column 'label' holds a dict"),
    ],
)
def test_bad_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^data/train\.jsonl: " + message):
        classify(GOOD, row)


def test_missing_columns_are_found_before_any_row_is_read() -> None:
    config = ClassificationFormat(type="classification", template="{sentence}", labels={"0": "a", "1": "b"})
    rows = rows_of({"text": None, "label": 0})
    with pytest.raises(
        DataError,
        match=r"^data/train\.jsonl: no column 'sentence' \(data\.format\.template\); the columns are text, label$",
    ):
        format_rows(rows, config)
    config = ClassificationFormat(type="classification", template="{text}", label="gold", labels={"0": "a", "1": "b"})
    with pytest.raises(DataError, match=r"no column 'gold' \(data\.format\.label\)"):
        format_rows(rows, config)
    with pytest.raises(DataError, match=r"no column 'completion' \(data\.format\.completion\); the columns are prompt"):
        format_rows(rows_of({"prompt": "x"}), PromptCompletionFormat(type="prompt_completion"))


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_completion(text: str) -> None:
    rows = rows_of({"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": text})
    with pytest.raises(DataError, match=r"^data/train\.jsonl: row 2: the completion is empty"):
        list(format_rows(rows, PromptCompletionFormat(type="prompt_completion")))
