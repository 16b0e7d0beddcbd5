"""Refuses models whose tokens see later ones: their loss on a text would be that of copying it."""

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from vamo_ft.core.errors import DataError

__all__ = ["check_causal"]

_BOTH_SIDES = {"cpmant", "xlnet"}
_BY_DEFAULT = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # unless they are made decoders


def check_causal(config: PreTrainedConfig, *, path: str) -> None:
    """Refuses what is no causal language model.

    transformers loads encoders such as BERT and RoBERTa as causal language models, with attention to both sides unless
    `is_decoder` is set, and only logs it.

    Raises:
        DataError: names the kind of model and what to write instead.
    """
    kind = config.model_type
    comes_with_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not comes_with_code:
        raise DataError(f"model.path: {path}: {kind} is not a causal language model; write a decoder model")
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(f"model.path: {path}: {kind} is an encoder with a decoder; write a decoder alone")
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    both_sides = getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all")
    if both_sides or kind in _BOTH_SIDES or (kind in _BY_DEFAULT and not decoder):
        raise DataError(
            f"model.path: {path}: {kind} is an encoder here, whose tokens see the ones to be predicted; write a "
            "decoder model, or model.task: sequence_classification"
        )
