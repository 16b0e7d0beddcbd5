"""From the task, the format and the `objective` section to the loss that is trained."""

from vamo_ft.config.schema import ClassificationFormat, RunConfig
from vamo_ft.core.protocols import Objective
from vamo_ft.models.loading import LoadedModel
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import SequenceClassification, VerbaliserClassification

__all__ = ["build_objective"]


def build_objective(config: RunConfig, loaded: LoadedModel) -> Objective:
    """The loss that the task and the data format call for."""
    if config.model.task == "sequence_classification":
        return SequenceClassification(loaded.model)
    language_model = CausalLM(loaded.model, accepts_logits_to_keep=loaded.accepts_logits_to_keep)
    if isinstance(config.data.format, ClassificationFormat):
        return VerbaliserClassification(language_model)
    return language_model
