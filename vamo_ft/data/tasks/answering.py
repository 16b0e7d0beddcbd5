"""Tasks whose answers are generated and compared with several references.

Structure as in Malladi et al. 2023, arXiv 2305.17333, appendix E. The first reference is learnt, and the best of all
counts.
"""

from vamo_ft.data.rows import Row
from vamo_ft.data.tasks.sample import Task, TaskSample, stripped, texts_of

__all__ = ["ANSWERING_TASKS"]


def _squad(row: Row, place: str) -> TaskSample:
    title = f"Title: {stripped(row, 'title', place).replace('_', ' ')}\n" if row.get("title") else ""
    prompt = f"{title}Context: {stripped(row, 'context', place)}\nQuestion: {stripped(row, 'question', place)}\nAnswer:"
    return TaskSample(prompt, references=texts_of(row, "answers", "text", place=place))


def _drop(row: Row, place: str) -> TaskSample:
    prompt = f"Passage: {stripped(row, 'passage', place)}\nQuestion: {stripped(row, 'question', place)}\nAnswer:"
    return TaskSample(prompt, references=texts_of(row, "answers_spans", "spans", place=place))


ANSWERING_TASKS = {
    "squad": Task(("context", "question", "answers"), _squad),
    "drop": Task(("passage", "question", "answers_spans"), _drop),
}
