"""Turns rows into prompts and completions, or into documents."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vamo_ft.config.data import ClassificationFormat, FormatConfig, PromptCompletionFormat, TextFormat
from vamo_ft.config.tasks import TaskFormat
from vamo_ft.core.errors import DataError
from vamo_ft.data.rows import Row, Rows
from vamo_ft.data.shots import Demonstrations
from vamo_ft.data.tasks import TASKS
from vamo_ft.data.values import check_columns, label_key, numbered, shown, text_of, value_of

__all__ = ["TextExample", "format_rows", "option_texts", "read_documents"]

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+")


@dataclass(frozen=True, slots=True)
class TextExample:
    """One sample as text.

    Attributes:
        label: the class number, in the order of `data.format.labels`, or that of the right one of `options`; or None.
        options: the sample's own texts to score after the prompt; none where those of the format serve.
        right: the numbers of all right options where several may be; none: `label` is the only one.
        references: right answers, where there may be several; none: the completion is the only one.
    """

    prompt: str
    completion: str
    label: int | None
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    right: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Column:
    name: str


@dataclass(frozen=True, slots=True)
class _Template:
    """Literal text and columns. A column is looked up by name and nothing else: no attributes, items or formats."""

    pieces: tuple[str | _Column, ...]

    @classmethod
    def parse(cls, text: str, *, key: str) -> "_Template":
        pieces: list[str | _Column] = []
        for match in _PIECE.finditer(text):
            if match[1] is not None:
                pieces.append(_Column(match[1]))
            elif match[0] in ("{", "}"):
                raise DataError(
                    f"{key}: '{match[0]}' at character {match.start() + 1} is not part of a '{{column}}'; "
                    f"write '{match[0] * 2}' for the character itself"
                )
            else:
                pieces.append(match[0][0] if match[0] in ("{{", "}}") else match[0])
        return cls(tuple(pieces))

    @property
    def columns(self) -> list[str]:
        return [piece.name for piece in self.pieces if isinstance(piece, _Column)]

    def fill(self, row: Row, *, place: str) -> str:
        return "".join(
            text_of(row, piece.name, place=place) if isinstance(piece, _Column) else piece for piece in self.pieces
        )


def option_texts(config: FormatConfig) -> dict[str, str]:
    """Class -> the text that follows the prompt, in the order of the classes, where every row has the same ones."""
    match config:
        case ClassificationFormat():
            return config.labels
        case TaskFormat():
            return dict(zip(config.classes, TASKS[config.name].words, strict=True))
        case _:
            return {}


def format_rows(
    rows: Rows,
    config: ClassificationFormat | PromptCompletionFormat | TaskFormat,
    *,
    demonstrations: Demonstrations | None = None,
    key: str = "data.format",
) -> Iterator[TextExample]:
    """The rows as text, one after another; templates and columns are checked before the first row is formatted.

    Args:
        demonstrations: solved examples to put in front of a task's prompts.
        key: of `config` in the configuration, for messages.

    Raises:
        DataError: a template is malformed or names a column that does not exist; from the iterator: a value is missing
            or null, a label is unknown, or a completion is empty.
    """
    match config:
        case ClassificationFormat():
            template = _Template.parse(config.template, key=f"{key}.template")
            check_columns(rows, template.columns, key=f"{key}.template")
            check_columns(rows, [config.label], key=f"{key}.label")
            return _classification(rows, config, template, key=key)
        case PromptCompletionFormat():
            prompt = _Template.parse(config.prompt, key=f"{key}.prompt")
            completion = _Template.parse(config.completion, key=f"{key}.completion")
            check_columns(rows, prompt.columns, key=f"{key}.prompt")
            check_columns(rows, completion.columns, key=f"{key}.completion")
            return _prompt_completion(rows, prompt, completion)
        case TaskFormat():
            check_columns(rows, TASKS[config.name].columns, key=f"{key}.name: {config.name}")
            return _task(rows, config, demonstrations)


def read_documents(rows: Rows, config: TextFormat, *, key: str = "data.format") -> Iterator[str]:
    """The documents, one after another; whether their column exists is checked before the first one is read.

    Args:
        key: of `config` in the configuration, for messages.

    Raises:
        DataError: there is no such column; from the iterator: a value is missing, null, or not text.
    """
    check_columns(rows, [config.column], key=f"{key}.column")
    return (text_of(row, config.column, place=place) for place, row in numbered(rows))


def _classification(
    rows: Rows, config: ClassificationFormat, template: _Template, *, key: str
) -> Iterator[TextExample]:
    classes = {label_key(name): index for index, name in enumerate(config.labels)}
    completions = list(config.labels.values())
    for place, row in numbered(rows):
        label = label_key(value_of(row, config.label, place=place))
        if label not in classes:
            raise DataError(f"{place}: label '{shown(label)}' is not among {key}.labels ({', '.join(config.labels)})")
        yield TextExample(template.fill(row, place=place), completions[classes[label]], classes[label])


def _prompt_completion(rows: Rows, prompt: _Template, completion: _Template) -> Iterator[TextExample]:
    for place, row in numbered(rows):
        text = completion.fill(row, place=place)
        if not text.strip():
            raise DataError(f"{place}: the completion is empty, so there is nothing to learn; remove the row")
        yield TextExample(prompt.fill(row, place=place), text, None)


def _task(rows: Rows, config: TaskFormat, demonstrations: Demonstrations | None) -> Iterator[TextExample]:
    task = TASKS[config.name]
    for place, row in numbered(rows):
        sample = task.build(row, place)
        prompt = sample.prompt if demonstrations is None else demonstrations.before(sample)
        if not sample.options:
            yield TextExample(prompt, sample.completion, None, references=sample.references)
        elif task.words:
            yield TextExample(prompt, sample.completion, sample.right[0])
        else:
            yield TextExample(prompt, sample.completion, sample.right[0], options=sample.options, right=sample.right)
