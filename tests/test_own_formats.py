"""Data sets with a format of their own: what is said of them, what is scored, and what a prompt shows."""

import json
import re
from typing import Any

import pytest
import yaml

from tests.chats import CHATML, chat_tokenizer
from tests.data.test_tasks import HUB
from tests.refusals import check_refused
from tests.tiny import byte_tokenizer, write_jsonl
from tests.workspace import Workspace, base_config, merged
from vamo_ft.cli import run
from vamo_ft.config.data import DataConfig
from vamo_ft.core.errors import DataError
from vamo_ft.data.loading import load_evaluation, load_samples

WORDS = {"type": "classification", "template": "{sentence}", "labels": {0: " b", 1: " c"}}
KEY = "data.train.1.format"
KEYS: dict[str, Any] = {"task": "causal_lm", "position_ids": True, "offline": True}


def task(name: str, **keys: Any) -> dict[str, Any]:
    return {"type": "task", "name": name, **keys}


def configure(workspace: Workspace, data: dict[str, Any], **changes: Any) -> None:
    config = merged(base_config(), {"training": {"steps": 2}, **changes})
    config["data"] = {"max_length": 400, **data}
    (workspace.root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@pytest.fixture
def files(workspace: Workspace) -> Workspace:
    for name in ("rte", "other"):
        rows = [HUB["rte"] | {"hypothesis": f"It {name} {n}.", "label": n % 2} for n in range(12)]
        write_jsonl(workspace.root / f"{name}.jsonl", rows)
    write_jsonl(workspace.root / "squad.jsonl", [HUB["squad"]])
    write_jsonl(workspace.root / "three.jsonl", [{"sentence": "x", "label": number % 3} for number in range(9)])
    write_jsonl(workspace.root / "chat.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    return workspace


@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        (
            "three.jsonl",
            {**WORDS, "template": "{text}"},
            "three.jsonl: no column 'text' ({key}.template); the columns are sentence, label",
        ),
        ("three.jsonl", {**WORDS, "template": "{x"}, "{key}.template: '{{' at character 1"),
        ("three.jsonl", {**WORDS, "label": "l"}, "no column 'l' ({key}.label)"),
        ("three.jsonl", WORDS, "three.jsonl: row 3: label '2' is not among {key}.labels (0, 1)"),
        ("three.jsonl", {"type": "prompt_completion"}, "no column 'prompt' ({key}.prompt)"),
        ("three.jsonl", {"type": "text"}, "no column 'text' ({key}.column)"),
        ("three.jsonl", {"type": "chat"}, "no column 'messages' ({key}.messages)"),
        ("chat.jsonl", {"type": "chat", "tools": "t"}, "no column 't' ({key}.tools)"),
        ("three.jsonl", task("rte"), "no column 'premise' ({key}.name: rte)"),
        ("rte.jsonl", task("rte", shots=50), "{key}.shots: 50 examples and one to spare"),
        ("three.jsonl", {**WORDS, "labels": {0: " b", 1: " c", 2: ""}}, "{key}.labels.2: the text '' has no tokens"),
    ],
)
def test_messages_name_the_format_of_the_data_set(
    files: Workspace, path: str, format: dict[str, Any], message: str
) -> None:
    own = {"path": path, "format": format}
    config = DataConfig.model_validate(
        {"train": [{"path": "train.jsonl"}, own], "format": {**WORDS, "template": "{sentence} It was"}}
    )
    with pytest.raises(DataError, match=re.escape(message.format(key=KEY))):
        load_samples(config, chat_tokenizer(), batch_size=2, seed=0, **KEYS)


def test_the_key_of_a_format() -> None:
    text, chat = {"type": "text"}, {"type": "chat"}
    config = DataConfig(
        train=[{"path": "a"}, {"path": "b", "format": chat}, {"path": "c", "format": chat}],
        evaluation={"path": "d", "format": {**text, "column": "x"}},
        format=text,
    )
    keys = [config.format_key(each) for _, each in config.places]
    assert keys == ["data.format", KEY, "data.train.2.format", "data.evaluation.format"]
    assert config.evaluation is not None
    another = config.evaluation.model_copy(update={"path": "e"})  # as with evaluate --data
    assert config.format_key(another) == "data.evaluation.format"
    assert DataConfig(train={"path": "a", "format": chat}, format=text).places[0][0] == "train"


def test_a_sample_per_class_is_refused_where_it_stands(files: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"path": "three.jsonl", "format": {"type": "text", "column": "sentence"}, "sample": {"per_class": 2}}
    configure(files, {"train": [{"path": "train.jsonl"}, own], "format": WORDS})
    said = "data.train.1.sample.per_class: the format's rows have no classes; write size"
    lines = (files.root / "config.yaml").read_text().splitlines()
    place = next(number for number, line in enumerate(lines, start=1) if "per_class" in line)
    check_refused(files, f"config.yaml:{place}: {said}", capsys, "validate", "config.yaml")


def test_predictions_name_the_classes_of_the_held_out_set(files: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {2: " d", 0: " b", 1: " c"}
    held_out = {"path": "three.jsonl", "format": {**WORDS, "labels": labels}}
    configure(files, {"train": {"path": "train.jsonl"}, "evaluation": held_out, "format": WORDS})
    assert files.train() == 0
    assert run(["evaluate", "runs/tiny", "--predictions", "out.jsonl"]) == 0
    lines = [json.loads(line) for line in (files.root / "out.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [str(number % 3) for number in range(9)]
    assert all(list(line["option_scores"]) == ["2", "0", "1"] for line in lines)


@pytest.mark.parametrize(("trained", "held_out"), [("sst2", "squad"), ("squad", "sst2"), ("drop", "copa")])
def test_tasks_that_are_scored_otherwise_are_refused(
    files: Workspace, capsys: pytest.CaptureFixture[str], trained: str, held_out: str
) -> None:
    own = {"path": "squad.jsonl", "format": task(held_out)}
    configure(
        files,
        {"train": {"path": "train.jsonl"}, "evaluation": own, "format": task(trained)},
        evaluation={"metrics": ["loss"]},
    )
    assert run(["validate", "config.yaml"]) == 2
    assert (
        f"data.evaluation.format.name: {held_out} is not scored as data.format's {trained}" in capsys.readouterr().err
    )


def test_options_of_another_task_are_scored(files: Workspace) -> None:
    """Label words in training, options of the rows in evaluation: both are options."""
    write_jsonl(files.root / "copa.jsonl", [HUB["copa"]] * 3)
    held_out = {"path": "copa.jsonl", "format": task("copa")}
    configure(files, {"train": {"path": "train.jsonl"}, "evaluation": held_out, "format": task("sst2")})
    assert files.train() == 0
    assert files.metrics()[-1]["eval.accuracy"] in (0.0, 1.0)


def test_solved_examples_come_from_the_first_set_of_the_task(files: Workspace) -> None:
    """The same in every prompt, whichever data set it is of, and never from a set of another task."""
    config = DataConfig(
        train=[
            {"path": "train.jsonl"},
            {"path": "rte.jsonl", "format": task("rte", shots=2)},
            {"path": "other.jsonl", "format": task("rte", shots=2)},
        ],
        evaluation={"path": "other.jsonl", "format": task("rte", shots=2)},
        format=task("sst2"),
        max_length=400,
    )
    source, _ = load_samples(config, byte_tokenizer(), batch_size=2, seed=0, **KEYS)
    assert config.evaluation is not None
    held_out = load_evaluation(config, config.evaluation, byte_tokenizer(), **KEYS)
    other = [index for index in range(source.num_samples) if source.origin(index)[0] == 2]
    prompts = [source.data[index].prompt_ids for index in other]
    assert prompts == [held_out.data[index].prompt_ids for index in range(12)]
    shown = [byte_tokenizer().decode(ids).rpartition("\n\n")[0] for ids in prompts]
    assert len(set(shown)) == 1
    assert shown[0].count("It rte") == 2
    assert "It other" not in shown[0]


def test_a_chat_is_measured_by_its_own_end_of_turn(files: Workspace) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    write_jsonl(files.root / "said.jsonl", [{"said": row["messages"]} for row in rows])
    write_jsonl(files.root / "chat.jsonl", rows)
    configure(
        files,
        {
            "train": [{"path": "chat.jsonl"}, {"path": "train.jsonl", "format": WORDS}],
            "evaluation": {"path": "said.jsonl", "format": {"type": "chat", "messages": "said"}},
            "format": {"type": "chat"},
            "chat_template": CHATML,
        },
        evaluation={"metrics": ["loss", "perplexity", "exact_match"], "max_new_tokens": 3},
    )
    assert files.train() == 0
    assert files.metrics()[-1]["eval.samples"] == 3
