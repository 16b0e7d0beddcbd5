"""Finds models that do not keep packed documents apart.

Shapes: B rows, T tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn

from vamo_ft.core.errors import DataError
from vamo_ft.models.loading import LoadedModel

__all__ = ["check_packing"]

_SHARE = 0.05


def check_packing(loaded: LoadedModel, *, path: str) -> None:
    """Refuses a model for which a document depends on what is packed in front of it.

    Whether a model heeds positions that start anew is nowhere declared, so it is tried: a few tokens behind others, in
    one row with padding and in one without, are compared with the same tokens behind different ones and alone. What is
    left of a difference has to be rounding, far below what the different tokens make out where they are seen.

    Raises:
        DataError: the model takes no positions, or the document depends on the other one, as in state-space models.
    """
    if loaded.accepts_position_ids and _keeps_apart(loaded.model):
        return
    raise DataError(
        f"data.packing: {path}: this model ({type(loaded.model).__name__}) does not keep packed documents apart, as "
        "attention with given positions does; write packing: false"
    )


def _keeps_apart(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    first, other, document = (torch.tensor(ids, device=device) % size for ids in ([5, 9, 7], [8, 4, 6], [3, 10, 12, 5]))
    packed = torch.tensor([[0, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    joined = torch.arange(8, device=device).expand(2, 8)

    def behind(start: Tensor, positions: Tensor) -> Tensor:
        rows = torch.stack([torch.cat([start[:1], start, document]), torch.cat([start, start[:1], document])])
        return _logits(model, rows, positions)[:, -len(document) :]  # (2, 4, V)

    training = model.training
    model.eval()
    try:
        alone = _logits(model, document.expand(2, -1), packed[:, 4:])
        apart, changed = behind(first, packed), behind(other, packed)
        seen = (behind(first, joined) - behind(other, joined)).abs().max()
    finally:
        model.train(training)
    left = torch.maximum((apart - changed).abs().max(), (apart - alone).abs().max())
    rounding = 4 * torch.finfo(next(model.parameters()).dtype).eps * alone.abs().max()
    return bool(left <= _SHARE * seen + rounding)


@torch.no_grad()
def _logits(model: nn.Module, rows: Tensor, positions: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=rows, position_ids=positions).logits
    return logits.double()
