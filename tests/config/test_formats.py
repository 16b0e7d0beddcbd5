import pytest

from tests.config.examples import VALID, load_text, problems_of
from vamo_ft.config.data import ChatFormat, TextFormat

CHAT = VALID.replace("type: prompt_completion", "type: chat")
TEXT = VALID.replace("type: prompt_completion", "type: text")
CLASSES = VALID.replace("type: prompt_completion", "type: classification\n    template: x\n    labels: {0: a, 1: b}")
SEQUENCE = ("  path: some/model", "  path: some/model\n  task: sequence_classification")
MEZO = ("name: vamo", "name: mezo")
SGD = ("name: adamw", "name: sgd")


def test_defaults() -> None:
    chat = load_text(CHAT).config.data
    assert chat.format == ChatFormat(type="chat", messages="messages", tools=None, system=None, train_on="assistant")
    assert (chat.packing, chat.chat_template) == (False, None)
    assert load_text(TEXT).config.data.format == TextFormat(type="text", column="text")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (CHAT, ["data.packing=true", "data.chat_template=my.jinja", "data.format.train_on=last"]),
        (CHAT, ["evaluation.metrics=[loss, exact_match, f1]", "data.packing=true"]),
        (TEXT, ["data.packing=true", "data.format.column=body"]),
        (VALID, ["data.packing=true"]),
        (CHAT.replace(*MEZO).replace(*SGD), ["objective={type: metric, name: f1}"]),
    ],
)
def test_what_goes_together(text: str, overrides: list[str]) -> None:
    load_text(text, *overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (TEXT, ["data.chat_template=x"], "data.chat_template: is used by format.type: chat alone; leave it out"),
        (CLASSES, ["data.packing=true"], "data.packing: a classification scores its samples one by one"),
        (CHAT.replace(*SEQUENCE), [], "data.format.type: a sequence_classification model needs classification"),
        (TEXT.replace(*SEQUENCE), [], "data.format.type: a sequence_classification model needs classification"),
        (TEXT, ["evaluation.metrics=[f1]"], "evaluation.metrics: f1 needs data.format.type: prompt_completion or chat"),
        (
            CHAT,
            ["evaluation.metrics=[accuracy]"],
            "evaluation.metrics: accuracy needs data.format.type: classification",
        ),
        (
            TEXT.replace(*MEZO).replace(*SGD),
            ["objective={type: metric, name: f1}"],
            "objective.name: f1 needs data.format.type: prompt_completion or chat",
        ),
        (
            CHAT.replace(*MEZO).replace(*SGD),
            ["objective={type: metric, name: f1}", "data.packing=true"],
            "data.packing: objective.type: metric scores samples one by one; leave it out",
        ),
        (
            TEXT,
            ["data.packing=true", "model.attn_implementation=flash_attention_2"],
            "data.packing: flash_attention_2 keeps documents apart in one row at a time only",
        ),
        (CHAT, ["data.format.train_on=user"], "data.format.train_on: must be 'assistant' or 'last', not 'user'"),
        (CHAT, ["data.format.column=x"], "data.format.column: unknown key"),
    ],
)
def test_what_does_not(text: str, overrides: list[str], said: str) -> None:
    [problem] = problems_of(text, *overrides)
    assert said in problem
