import torch
from torch import nn

from tests.tiny import VOCABULARY, tiny_llama
from vamo_ft.core.types import Work
from vamo_ft.training.ledger import Ledger


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 2)


def test_flops_are_two_per_matrix_element_and_token():
    network = TwoLayers()
    network.first.requires_grad_(False)
    ledger = Ledger.of(network)
    matrices, trained = 3 * 5 + 5 * 2, 5 * 2
    assert ledger.flops(Work(forward_tokens=7)) == 2 * matrices * 7
    assert ledger.flops(Work(backward_tokens=7)) == 2 * (matrices + trained) * 7


def test_untied_input_embeddings_are_looked_up_not_multiplied():
    embedding = VOCABULARY * 32
    untied, tied = Ledger.of(tiny_llama()), Ledger.of(tiny_llama(tied=True))
    assert untied == tied  # the head of one, the shared matrix of the other
    total = sum(p.numel() for p in tiny_llama().parameters() if p.ndim >= 2)
    assert untied.num_parameters == total - embedding
    assert torch.is_tensor(tiny_llama().lm_head.weight)
