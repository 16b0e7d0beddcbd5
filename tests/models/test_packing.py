import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from tests.tiny import VOCABULARY, byte_tokenizer, tiny_gpt2, tiny_llama
from vamo_ft.core.errors import DataError
from vamo_ft.models.loading import LoadedModel
from vamo_ft.models.packing import check_packing


def check(model: PreTrainedModel, *, positions: bool = True) -> None:
    model.config.use_cache = False
    check_packing(LoadedModel(model, byte_tokenizer(), positions, True), path="m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_attention_keeps_documents_apart(build, dtype) -> None:
    model = build().to(dtype).train()
    check(model)
    assert model.training


def test_a_state_runs_on_through_documents() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4))
    forward = model.forward
    model.forward = lambda input_ids, position_ids: forward(input_ids)
    with pytest.raises(DataError, match=r"^data\.packing: m: this model \(MambaForCausalLM\) does not keep packed"):
        check(model)


def test_attention_that_leaves_positions_aside() -> None:
    class Deaf(type(tiny_llama())):
        def forward(self, input_ids, position_ids):
            return super().forward(input_ids)

    model = tiny_llama()
    model.__class__ = Deaf
    with pytest.raises(DataError, match=r"does not keep packed documents apart, .*; write packing: false"):
        check(model)


def test_a_model_without_positions() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(DataError, match=r"this model \(BloomForCausalLM\)"):
        check(model, positions=False)
