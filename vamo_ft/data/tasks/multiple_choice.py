"""Tasks whose rows bring the texts to choose from.

Structure as in Malladi et al. 2023, arXiv 2305.17333, appendix E: a choice is scored as the text that it makes of the
sentence, by the mean log-probability of its tokens.
"""

from vamo_ft.core.errors import DataError
from vamo_ft.data.rows import Row
from vamo_ft.data.tasks.sample import Task, TaskSample, first_letter, stripped, texts_of
from vamo_ft.data.values import label_key, shown, text_of, value_of

__all__ = ["MULTIPLE_CHOICE_TASKS"]

_CONNECTIVES = {"cause": "because", "effect": "so"}
_CHOICES = {"0": 0, "choice1": 0, "1": 1, "choice2": 1}
_PLACEHOLDER = "@placeholder"


def _copa(row: Row, place: str) -> TaskSample:
    """The premise goes on with because or so, and with a choice."""
    asked = stripped(row, "question", place)
    if asked not in _CONNECTIVES:
        raise DataError(f"{place}: question '{shown(asked)}' is none of the task copa (cause, effect)")
    key = label_key(value_of(row, "label", place=place))
    if key not in _CHOICES:
        raise DataError(f"{place}: label '{shown(key)}' is none of the task copa (0 or choice1, 1 or choice2)")
    options = tuple(f" {_continued(stripped(row, column, place))}" for column in ("choice1", "choice2"))
    prompt = f"{stripped(row, 'premise', place).rstrip('.')} {_CONNECTIVES[asked]}"
    return TaskSample(prompt, options=options, right=(_CHOICES[key],))


def _continued(sentence: str) -> str:
    """The sentence as it stands within another; only the pronoun keeps its capital."""
    first = sentence.split("'")[0].split()[:1]
    return sentence if first == ["I"] else first_letter(sentence, str.lower)


def _record(row: Row, place: str) -> TaskSample:
    """The passage, its highlights as a list, which goes on with the query; an entity stands in the query's gap.

    Every entity that is among the answers is right, and the first answer is learnt.
    """
    query = stripped(row, "query", place)
    if _PLACEHOLDER not in query:
        raise DataError(f"{place}: column 'query' has no {_PLACEHOLDER}")
    passage = text_of(row, "passage", place=place).strip().replace("@highlight\n", "- ")
    entities = texts_of(row, "entities", None, place=place)
    answers = texts_of(row, "answers", None, place=place)
    right = tuple(entities.index(answer) for answer in answers if answer in entities)
    if not right:
        raise DataError(f"{place}: no answer is among the entities; remove the row")
    options = tuple(f" {query.replace(_PLACEHOLDER, entity)}" for entity in entities)
    return TaskSample(f"{passage}\n-", options=options, right=right)


MULTIPLE_CHOICE_TASKS = {
    "copa": Task(("premise", "choice1", "choice2", "question", "label"), _copa),
    "record": Task(("passage", "query", "entities", "answers"), _record),
}
