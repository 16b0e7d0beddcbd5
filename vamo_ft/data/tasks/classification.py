"""Tasks with a fixed set of classes, each with a word that follows the prompt.

The order of what a prompt holds and the words are those of Malladi et al. 2023, "Fine-Tuning Language Models with Just
Forward Passes", arXiv 2305.17333, appendix E; the wording is ours. A prompt ends with a line end where the word stands
on a line of its own, and before the word's space where it goes on in the sentence.
"""

from collections.abc import Callable

from vamo_ft.config.tasks import TASK_CLASSES
from vamo_ft.core.errors import DataError
from vamo_ft.data.rows import Row
from vamo_ft.data.tasks.sample import Task, TaskSample, first_letter, stripped
from vamo_ft.data.values import label_key, shown, value_of

__all__ = ["CLASSIFICATION_TASKS"]

_NO_YES = ("No", "Yes")


def _sst2(sentence: str) -> str:
    return f"{sentence} It was"


def _rte(premise: str, hypothesis: str) -> str:
    return f'{premise}\nDoes it follow that "{hypothesis}"? Answer Yes or No.\n'


def _cb(premise: str, hypothesis: str) -> str:
    return f'Let it be given that {premise}\nDoes it follow that "{hypothesis}"? Answer Yes, No or Maybe.\n'


def _boolq(passage: str, question: str) -> str:
    return f"{passage}\n{first_letter(question, str.upper).rstrip('?')}? Answer Yes or No.\n"


def _wsc(text: str, noun: str, pronoun: str) -> str:
    return f'{text}\nDoes "{pronoun}" stand for {noun} there? Answer Yes or No.\n'


def _wic(word: str, first: str, second: str) -> str:
    return f'Is "{word}" used in one and the same sense in both sentences? Answer Yes or No.\n{first}\n{second}\n'


def _multirc(paragraph: str, question: str, answer: str) -> str:
    return f'{paragraph}\nQuestion: {question}\nOne answer is "{answer}". Is it right? Answer Yes or No.\n'


def _task(name: str, columns: tuple[str, ...], prompt: Callable[..., str], words: tuple[str, ...]) -> Task:
    """A task with the column `label`, a class by number or by name; `prompt` takes the other columns in turn."""
    names = TASK_CLASSES[name]
    numbers = {key: number for number, label in enumerate(names) for key in (str(number), label)}

    def build(row: Row, place: str) -> TaskSample:
        key = label_key(value_of(row, "label", place=place))
        if key not in numbers:
            known = ", ".join(f"{number} or {label}" for number, label in enumerate(names))
            raise DataError(f"{place}: label '{shown(key)}' is none of the task {name} ({known})")
        text = prompt(*(stripped(row, column, place) for column in columns))
        return TaskSample(text, options=words, right=(numbers[key],))

    return Task((*columns, "label"), build, words)


CLASSIFICATION_TASKS = {
    "sst2": _task("sst2", ("sentence",), _sst2, (" terrible", " great")),
    "rte": _task("rte", ("premise", "hypothesis"), _rte, ("Yes", "No")),
    "cb": _task("cb", ("premise", "hypothesis"), _cb, ("Yes", "No", "Maybe")),
    "boolq": _task("boolq", ("passage", "question"), _boolq, _NO_YES),
    "wsc": _task("wsc", ("text", "span1_text", "span2_text"), _wsc, _NO_YES),
    "wic": _task("wic", ("word", "sentence1", "sentence2"), _wic, _NO_YES),
    "multirc": _task("multirc", ("paragraph", "question", "answer"), _multirc, _NO_YES),
}
