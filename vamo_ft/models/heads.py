"""The head of a classifier: how many classes it has, what they are called, which parameters are its own."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from vamo_ft.core.errors import DataError

__all__ = ["belongs_to_head", "name_classes", "set_num_labels"]


def set_num_labels(model_config: Any, num_labels: int, *, path: str) -> None:
    """Sets the number of classes.

    Raises:
        DataError: the weights hold a classifier of another number.
    """
    architecture = (getattr(model_config, "architectures", None) or [""])[0]
    if architecture.endswith("ForSequenceClassification") and model_config.num_labels != num_labels:
        raise DataError(
            f"model.path: {path}: its classifier has {model_config.num_labels} labels and data.format.labels has "
            f"{num_labels}; write as many, or choose a model without a classifier"
        )
    model_config.num_labels = num_labels


def name_classes(model_config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Calls the classes of a head so that has no names for them.

    Without names config.json may not even tell their number: where it is 2, transformers leaves it out.
    """
    if names and all(name == f"LABEL_{index}" for index, name in model_config.id2label.items()):
        model_config.id2label = dict(enumerate(names))
        model_config.label2id = {name: index for index, name in enumerate(names)}


def belongs_to_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a parameter is of what stands on the base model, and may be new."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name
