"""A LoRA adapter merged into its base model."""

import warnings

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from vamo_ft.core.errors import DataError
from vamo_ft.models.export import quietly

__all__ = ["merge_adapter"]

_ROWS, _TOKENS = 2, 16
_TOLERANCE = 1e-3  # of the largest logit; float32 gives some 1e-6


@torch.no_grad()
def merge_adapter(model: PreTrainedModel | PeftModel) -> tuple[PreTrainedModel, float]:
    """`W + s B A` in the place of each adapted W, added in float32 and then rounded to W's type; `model` is used up.

    The logits of a batch of random tokens are compared before and after, in float32 and before the rounding.

    Returns:
        The model without peft, its parameters of the base's type, and the largest difference of two logits as a share
        of the largest logit.

    Raises:
        DataError: the logits differ: the model computes something with an adapted layer that no merged weight can do,
            such as sharing it with one that is not adapted.
    """
    assert isinstance(model, PeftModel), "there is an adapter"
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype)
    model.eval()
    model.float()
    ids = _random_ids(model)
    expected = _logits(model, ids)
    with quietly(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Model with `tie_word_embeddings=True`"
        )  # where it matters it is seen
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    difference = float((_logits(merged, ids) - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise DataError(
            f"--merge: the merged model's logits differ by {difference:.1e} of the largest from those with the "
            "adapter; an adapted layer shares its weight with another; export the adapter without --merge"
        )
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    return merged, difference


def _random_ids(model: PeftModel) -> Tensor:
    """(2, 16) int64."""
    rows = model.get_input_embeddings().weight.shape[0]
    return torch.randint(rows, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)


def _logits(model: PeftModel | PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits
