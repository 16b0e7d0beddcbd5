"""A LoRA adapter merged into its base model."""

import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from vamo_ft.core.errors import DataError
from vamo_ft.models.export import Dtype, quietly

__all__ = ["MergeCheck", "cast", "merge_adapter"]

_ROWS, _TOKENS = 2, 16
_TOLERANCE = 1e-3  # of the largest logit; float32 gives some 1e-6


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """Largest differences of two logits, as shares of the largest logit with the adapter in float32.

    Attributes:
        merged: of the merged model in float32.
        rounded: of the merged model as it is written.
        dtype: what it is written in.
    """

    merged: float
    rounded: float
    dtype: str

    def __str__(self) -> str:
        """For the log and the model card."""
        text = f"logits differ by at most {self.merged:.1e} of the largest from those with the adapter"
        return text if self.dtype == "float32" else f"{text}, and by {self.rounded:.1e} once rounded to {self.dtype}"


@torch.no_grad()
def merge_adapter(
    model: PreTrainedModel | PeftModel, *, dtype: Dtype | None = None
) -> tuple[PreTrainedModel, MergeCheck]:
    """`W + s B A` in the place of each adapted W, added in float32 and then rounded; `model` is used up.

    The logits of a batch of random tokens are compared before and after, in float32 and before the rounding.

    Args:
        dtype: what the parameters are rounded to; None: the base's type.

    Returns:
        The model without peft, and how its logits compare.

    Raises:
        DataError: the logits differ: the model computes something with an adapted layer that no merged weight can do,
            such as sharing it with one that is not adapted.
    """
    assert isinstance(model, PeftModel), "there is an adapter"
    name = str(model.config.dtype).removeprefix("torch.") if dtype is None else dtype
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
    cast(merged, name)
    rounded = float((_logits(merged, ids).float() - expected).abs().max() / expected.abs().max())
    return merged, MergeCheck(difference, rounded, name)


def cast(model: PreTrainedModel | PeftModel, dtype: str) -> None:
    """Rounds every parameter to the type of that name."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def _random_ids(model: PeftModel) -> Tensor:
    """(2, 16) int64; an encoder-decoder's classifier reads off one end-of-text token, here the last in each row."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    if model.config.is_encoder_decoder:
        end = model.config.eos_token_id
        ids[ids == end] = (end + 1) % rows
        ids[:, -1] = end
    return ids.to(model.device)


def _logits(model: PeftModel | PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits
