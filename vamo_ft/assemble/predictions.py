"""What a model answers to each held-out sample, one JSON object a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vamo_ft.config.data import DataSetConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.errors import UsageError
from vamo_ft.core.types import Batch, EvaluationTerms
from vamo_ft.data.examples import Example
from vamo_ft.data.places import row_places
from vamo_ft.data.samples import EvaluationSamples
from vamo_ft.models.generation import Decode
from vamo_ft.training.rundir import write_text
from vamo_ft.training.sinks import finite

__all__ = ["Predictions"]


class Predictions:
    """Collects what an evaluation learns of each sample, and writes it in the order of the data.

    Every line has `index`, `place`, `prompt` as the model reads it, `loss` (the mean over the sample's supervised
    tokens), their number as `weight` (both of the sample for a classifier head), and the scores by name. Between
    options or classes also `label`, which is learnt, `prediction` and `option_scores`, what decides, and `right` where
    several options may be; of a generated answer `answer`; of free text `references`, the right answers.

    Args:
        held_out: the samples.
        decode: gives the texts of rows of tokens, without special tokens.
        decode_all: the same with special tokens, for prompts.
    """

    def __init__(
        self,
        config: RunConfig,
        data_set: DataSetConfig,
        held_out: EvaluationSamples,
        *,
        decode: Decode,
        decode_all: Decode,
    ) -> None:
        self._classes = config.data.of(data_set).format.classes
        self._data_set = data_set
        self._data = held_out.data
        self._decode = decode
        self._decode_all = decode_all
        self._found: dict[int, dict[str, Any]] = {}

    def observe(self, batch: Batch, terms: EvaluationTerms) -> None:
        """Keeps the figures of a batch; an `Observer`."""
        losses, weights = terms.loss.total.tolist(), terms.loss.count.tolist()
        scores = {name: values.tolist() for name, values in terms.scores.items()}
        for row, index in enumerate(batch.indices):
            found: dict[str, Any] = {}
            example = self._data[index]
            if terms.option_scores is not None:
                found |= self._choice(example, terms.option_scores[row])
            else:
                found |= {"answer": terms.answers[row]} if terms.answers else {}
                found["references"] = list(example.references) or self._decode([example.completion_ids])
            found |= {name: values[row] for name, values in scores.items()}
            self._found[index] = found | {"loss": losses[row] / weights[row], "weight": weights[row]}

    def write(self, path: Path) -> None:
        """Replaces `path` in one step.

        Raises:
            DataError: the data is not what it was before.
            UsageError: the file cannot be written.
        """
        indices = sorted(self._found)
        places = row_places(self._data_set, [self._data.rows_of(index)[0] for index in indices])
        lines = []
        for index, place in zip(indices, places, strict=True):
            [prompt] = self._decode_all([self._data[index].prompt_ids])
            line = {"index": index, "place": place, "prompt": prompt, **self._found[index]}
            lines.append(json.dumps(finite(line), ensure_ascii=False, allow_nan=False))
        try:
            write_text(path, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UsageError(f"--predictions: {path}: cannot be written ({error.strerror or error})") from error

    def _choice(self, example: Example, option_scores: Tensor) -> dict[str, Any]:
        names = self._names(example)
        scores: list[float] = option_scores[: len(names)].tolist()
        assert example.label is not None
        best = None if any(score != score for score in scores) else names[scores.index(max(scores))]
        right = {"right": [names[option] for option in example.right]} if example.right else {}
        figures = dict(zip(names, scores, strict=True))
        return {"label": names[example.label], **right, "prediction": best, "option_scores": figures}

    def _names(self, example: Example) -> Sequence[str]:
        """Of the classes, or the sample's own options as text."""
        if not example.options:
            return self._classes
        return [text.strip() for text in self._decode(example.options)]
