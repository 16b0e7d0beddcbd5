"""Finds models that read the padding in front of a row.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vamo_ft.core.errors import DataError
from vamo_ft.models.loading import LoadedModel

__all__ = ["check_padding"]

_SHARE = 0.1


def check_padding(loaded: LoadedModel, *, path: str) -> None:
    """Refuses a language model whose outputs depend on the padding in front of a row.

    Rows of a batch are padded on the left. Whether a model heeds the attention mask and the positions that say so is
    nowhere declared, so it is tried: a few tokens behind padding are compared with the same tokens given alone, without
    mask and positions. What is left of a difference has to be well below what other tokens make out in the padding's
    place. Call it in the precision of the run: some attention kernels know no other.

    Raises:
        DataError: the outputs depend on it, as in recurrent models that take no mask.
    """
    if _leak(loaded) <= _SHARE:
        return
    raise DataError(
        f"model.path: {path}: this model ({type(loaded.root).__name__}) does not leave the padding in front of a row "
        "out, so that losses would depend on what else is in the batch; choose another model"
    )


def _leak(loaded: LoadedModel) -> float:
    """The change through padding, as a share of that through other tokens; beneath rounding it is 0."""
    embedding = loaded.model.get_input_embeddings().weight
    device, size = embedding.device, embedding.shape[0]
    document = torch.tensor([3, 10, 12, 5], device=device) % size
    others = torch.tensor([5, 9, 7, 8], device=device) % size
    padding = torch.full_like(others, int(loaded.tokenizer.pad_token_id))
    ids = torch.stack([torch.cat([padding, document]), torch.cat([others, document])])  # (B = 2, T = 8)
    mask = torch.ones_like(ids)
    mask[0, : len(padding)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if loaded.accepts_position_ids:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    training = loaded.model.training
    loaded.model.eval()
    try:
        alone = _logits(loaded, {"input_ids": document.unsqueeze(0)})[0]  # (4, V)
        padded, behind = _logits(loaded, inputs)[:, -len(document) :]  # (4, V) each
    finally:
        loaded.model.train(training)
    change, seen = (float((rows - alone).abs().max()) for rows in (padded, behind))
    rounding = 4 * _eps(loaded, device) * float(alone.abs().max())
    return 0.0 if change <= rounding else change / max(seen, rounding)


def _eps(loaded: LoadedModel, device: torch.device) -> float:
    """Of the coarsest precision of the arithmetic."""
    dtypes = {parameter.dtype for parameter in loaded.model.parameters() if parameter.is_floating_point()}
    if loaded.four_bits is not None:
        dtypes.add(getattr(torch, loaded.four_bits.config.compute_dtype))
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@torch.no_grad()
def _logits(loaded: LoadedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = loaded.root(**inputs).logits
    return logits.double()
