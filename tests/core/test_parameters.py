"""Fingerprints of what is trained and of what is not."""

import hashlib

import pytest
import torch
from torch import nn

from vamo_ft.core.parameters import TrainableParameters, frozen_digest


def network(*, frozen_bias: bool = True) -> nn.Sequential:
    """A trained matrix, a frozen bias of 600 elements, and buffers that are saved and that are not."""
    model = nn.Sequential(nn.Linear(3, 600, dtype=torch.bfloat16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    model[0].bias.requires_grad_(not frozen_bias)
    model.register_buffer("saved", torch.tensor(3))
    model.register_buffer("table", torch.zeros(2), persistent=False)
    return model


def test_the_frozen_digest_is_that_of_every_nth_value() -> None:
    expected = hashlib.sha256(b"0.bias torch.bfloat16 (600,)\n")
    expected.update(torch.arange(0, 600, 3).bfloat16().view(torch.uint8).numpy().tobytes())
    expected.update(b"saved torch.int64 ()\n")
    expected.update(b"\x03" + bytes(7))
    assert frozen_digest(network()) == expected.hexdigest()


@pytest.mark.parametrize("change", ["bias", "saved", "frozen", "name"])
def test_the_frozen_digest_sees_what_is_not_trained(change: str) -> None:
    model = network(frozen_bias=change != "frozen")
    with torch.no_grad():
        if change == "bias":
            model[0].bias.mul_(2)
        elif change == "saved":
            model.saved.add_(1)
        elif change == "name":
            model.add_module("1", nn.LayerNorm(3).requires_grad_(False))
    assert frozen_digest(model) != frozen_digest(network())


def test_the_digests_see_nothing_else() -> None:
    model = network()
    digest = TrainableParameters(model).digest()
    with torch.no_grad():
        model[0].weight.add_(1)
        model.table.add_(1)
    assert frozen_digest(model) == frozen_digest(network())
    assert TrainableParameters(model).digest() != digest
    with torch.no_grad():
        model[0].bias.add_(1)
        model[0].weight.copy_(network()[0].weight)
    assert TrainableParameters(model).digest() == digest
