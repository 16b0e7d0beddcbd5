"""What each task makes of a row, by hand; and of real rows where they are at hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from vamo_ft.config.tasks import TASK_CLASSES, TaskFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.tasks import TASKS, TaskSample

NO_YES = ("No", "Yes")
HUB = {  # one row of each task, in the columns of its Hub data set
    "sst2": {"idx": 0, "sentence": "a warm and clever film ", "label": 1},
    "rte": {"premise": "Rain fell on Lisbon.", "hypothesis": "Lisbon got wet.", "label": 0, "idx": 1},
    "cb": {"premise": "Ann said that Bo may have left.", "hypothesis": "Bo has left", "label": 2},
    "boolq": {"question": "is chalk a rock", "passage": "Chalk is a soft limestone.", "label": 1},
    "wsc": {
        "text": "Tom waved at Jim because he knew him.",
        "span1_text": "Tom",
        "span2_text": "he",
        "span1_index": 0,
        "span2_index": 5,
        "label": 1,
    },
    "wic": {
        "word": "bank",
        "sentence1": "The bank of the river.",
        "sentence2": "A bank lends money.",
        "label": 0,
        "start1": 4,
    },
    "multirc": {
        "paragraph": "Mia ate an apple.",
        "question": "What did Mia eat?",
        "answer": "A pear",
        "idx": {"paragraph": 0, "question": 0, "answer": 0},
        "label": 0,
    },
    "copa": {
        "premise": "The lamp went out.",
        "choice1": "The bulb had burnt through.",
        "choice2": "I opened a window.",
        "question": "cause",
        "label": 0,
    },
    "record": {
        "passage": "Ada met Bob in Rome.\n@highlight\nAda met Bob\n@highlight\nBoth liked Rome",
        "query": "It was @placeholder who had booked the rooms for @placeholder.",
        "entities": ["Ada", "Bob", "Rome"],
        "answers": ["Bob", "Ada", "Bob"],
    },
    "squad": {
        "id": "1",
        "title": "River_Thames",
        "context": "The Thames flows through London.",
        "question": "What flows through London?",
        "answers": {"text": ["The Thames", "Thames", "The Thames"], "answer_start": [0, 4, 0]},
    },
    "drop": {
        "passage": "They scored 7 points, then 3.",
        "question": "How many points in all?",
        "answers_spans": {"spans": ["10", "ten"], "types": ["number", "span"]},
    },
}
GOLDEN = {
    "sst2": TaskSample("a warm and clever film It was", options=(" terrible", " great"), right=(1,)),
    "rte": TaskSample(
        'Rain fell on Lisbon.\nDoes it follow that "Lisbon got wet."? Answer Yes or No.\n',
        options=("Yes", "No"),
        right=(0,),
    ),
    "cb": TaskSample(
        "Let it be given that Ann said that Bo may have left.\n"
        'Does it follow that "Bo has left"? Answer Yes, No or Maybe.\n',
        options=("Yes", "No", "Maybe"),
        right=(2,),
    ),
    "boolq": TaskSample("Chalk is a soft limestone.\nIs chalk a rock? Answer Yes or No.\n", options=NO_YES, right=(1,)),
    "wsc": TaskSample(
        'Tom waved at Jim because he knew him.\nDoes "he" stand for Tom there? Answer Yes or No.\n',
        options=NO_YES,
        right=(1,),
    ),
    "wic": TaskSample(
        'Is "bank" used in one and the same sense in both sentences? Answer Yes or No.\n'
        "The bank of the river.\nA bank lends money.\n",
        options=NO_YES,
        right=(0,),
    ),
    "multirc": TaskSample(
        'Mia ate an apple.\nQuestion: What did Mia eat?\nOne answer is "A pear". Is it right? Answer Yes or No.\n',
        options=NO_YES,
        right=(0,),
    ),
    "copa": TaskSample(
        "The lamp went out because",
        options=(" the bulb had burnt through.", " I opened a window."),
        right=(0,),
    ),
    "record": TaskSample(
        "Ada met Bob in Rome.\n- Ada met Bob\n- Both liked Rome\n-",
        options=(
            " It was Ada who had booked the rooms for Ada.",
            " It was Bob who had booked the rooms for Bob.",
            " It was Rome who had booked the rooms for Rome.",
        ),
        right=(1, 0),
    ),
    "squad": TaskSample(
        "Title: River Thames\nContext: The Thames flows through London.\nQuestion: What flows through London?\nAnswer:",
        references=("The Thames", "Thames"),
    ),
    "drop": TaskSample(
        "Passage: They scored 7 points, then 3.\nQuestion: How many points in all?\nAnswer:", references=("10", "ten")
    ),
}
COMPLETIONS = {
    "sst2": " great",
    "rte": "Yes",
    "copa": " the bulb had burnt through.",
    "record": " It was Bob who had booked the rooms for Bob.",
    "squad": " The Thames",
    "drop": " 10",
}


def build(name: str, row: dict[str, Any]) -> TaskSample:
    return TASKS[name].build(row, "here: row 1")


@pytest.mark.parametrize("name", TASKS)
def test_a_row_becomes_what_was_written_by_hand(name: str) -> None:
    assert build(name, HUB[name]) == GOLDEN[name]
    assert build(name, HUB[name]).completion == COMPLETIONS.get(name, build(name, HUB[name]).completion)
    assert set(TASKS[name].columns) <= HUB[name].keys()


def test_every_task_of_the_configuration_is_there() -> None:
    assert set(get_args(TaskFormat.model_fields["name"].annotation)) == set(TASKS) == set(HUB)
    for name, task in TASKS.items():
        classes = TaskFormat(type="task", name=name).classes
        assert len(task.words) == len(classes)
        assert GOLDEN[name].options == task.words or not classes


@pytest.mark.parametrize("name", TASKS)
def test_the_readme_lists_the_columns_and_the_words(name: str) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
    columns, given = (cell.strip().split(", ") for cell in row.split("|")[2:4])
    assert tuple(columns) == TASKS[name].columns
    assert not TASKS[name].words or tuple(given) == tuple(map(str.strip, TASKS[name].words))


@pytest.mark.parametrize("name", TASK_CLASSES)
def test_labels_may_be_numbers_or_names(name: str) -> None:
    for number, label in enumerate(TASK_CLASSES[name]):
        for value in (number, str(number), float(number), label):
            assert build(name, HUB[name] | {"label": value}).right == (number,)
    if TASK_CLASSES[name] == ("false", "true"):
        assert [build(name, HUB[name] | {"label": value}).right for value in (False, "True")] == [(0,), (1,)]


def test_copa_asks_for_an_effect_too() -> None:
    sample = build("copa", HUB["copa"] | {"question": "effect", "label": "choice2", "choice1": "I'm in the dark."})
    assert sample.prompt == "The lamp went out so"
    assert sample.options[0] == " I'm in the dark."
    assert sample.completion == " I opened a window."


def test_a_title_is_shown_where_there_is_one() -> None:
    row = {key: value for key, value in HUB["squad"].items() if key != "title"}
    assert build("squad", row).prompt.startswith("Context: ")
    assert build("squad", HUB["squad"] | {"answers": ["Thames"]}).references == ("Thames",)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("sst2", {"label": -1}, "label '-1' is none of the task sst2 (0 or negative, 1 or positive)"),
        ("cb", {"label": "yes"}, "label 'yes' is none of the task cb (0 or entailment, 1 or contradiction, 2 or"),
        ("rte", {"premise": None}, "column 'premise' is null"),
        ("rte", {"hypothesis": " "}, "column 'hypothesis' is empty"),
        ("wic", {"word": ["a"]}, "column 'word' holds a list; use text, a number, true or false"),
        ("copa", {"question": "why"}, "question 'why' is none of the task copa (cause, effect)"),
        ("copa", {"label": 2}, "label '2' is none of the task copa (0 or choice1, 1 or choice2)"),
        ("record", {"query": "It was"}, "column 'query' has no @placeholder"),
        ("record", {"answers": ["Eve"]}, "no answer is among the entities; remove the row"),
        ("record", {"answers": []}, "column 'answers' holds no text; remove the row"),
        ("record", {"entities": "Ada"}, "column 'entities' holds no list of texts"),
        ("squad", {"answers": {"text": []}}, "column 'answers', field 'text', holds no text; remove the row"),
        ("squad", {"answers": {"texts": ["a"]}}, "column 'answers', field 'text', holds no list of texts"),
        ("squad", {"answers": {"text": ["a\ud800"]}}, "column 'answers' is not valid Unicode at character 2"),
        ("drop", {"answers_spans": {"spans": [10]}}, "column 'answers_spans', field 'spans', holds no list of texts"),
    ],
)
def test_rows_that_a_task_cannot_use(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        build(name, HUB[name] | changes)
    assert str(caught.value).startswith(f"here: row 1: {said}")


@pytest.mark.parametrize(("name", "counts"), [("rte", {0: 1249, 1: 1241}), ("sst2", {0: 3310, 1: 3610})])
def test_every_real_row_is_understood(name: str, counts: dict[int, int]) -> None:
    file = Path(__file__).resolve().parents[3] / "shared" / "data" / name / "train.jsonl"
    if not file.exists():
        pytest.skip("the real data sets are not here")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    samples = [build(name, row) for row in rows]
    assert Counter(sample.right[0] for sample in samples) == counts
    text = {"rte": "hypothesis", "sst2": "sentence"}[name]
    assert all(row[text].strip() in sample.prompt for row, sample in zip(rows, samples, strict=True))
