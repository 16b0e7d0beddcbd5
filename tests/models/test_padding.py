from functools import wraps
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from tests.tiny import VOCABULARY, byte_tokenizer, initialised, save_model_folder, tiny_gpt2, tiny_llama
from tests.workspace import Workspace
from vamo_ft.core.errors import DataError
from vamo_ft.models.loading import LoadedModel
from vamo_ft.models.padding import check_padding

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}


def check(model: PreTrainedModel, *, positions: bool) -> None:
    model.config.use_cache = False
    check_padding(LoadedModel(model, byte_tokenizer(), positions, True), path="m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_attention_leaves_padding_out(build, dtype) -> None:
    model = build().to(dtype).train()
    check(model, positions=True)
    assert model.training


def test_what_autocast_rounds_is_no_padding() -> None:
    """Two rows are rounded otherwise than one, as kernels of a device do."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 1e-3  # so that other tokens change little more than rounding does
    model.lm_head.register_forward_hook(lambda module, given, logits: logits * (1 + (len(logits) - 1) / 256))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, positions=True)
    with pytest.raises(DataError, match="does not leave the padding"):
        check(model, positions=True)


def test_a_run_tries_in_its_own_precision(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of it flash attention refuses float32 weights."""
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def flash(*args: Any, **kwargs: Any) -> Any:
        assert torch.is_autocast_enabled("cpu"), "FlashAttention only support fp16 and bf16 data type"
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", flash)
    workspace.configure({"training": {"autocast": "bfloat16"}})
    assert workspace.train() == 0


def test_a_state_that_takes_a_mask_leaves_it_out() -> None:
    check(initialised(MambaForCausalLM, MambaConfig(**SMALL, state_size=4)), positions=False)


def test_a_state_that_takes_none() -> None:
    model = initialised(RwkvForCausalLM, RwkvConfig(**SMALL))
    with pytest.raises(DataError, match=r"^model\.path: m: this model \(RwkvForCausalLM\) does not leave the padding"):
        check(model, positions=False)


def test_a_run_of_such_a_model_is_refused(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_folder(workspace.root / "model", initialised(RwkvForCausalLM, RwkvConfig(**SMALL)))
    workspace.configure()
    assert workspace.train() == 2
    assert "does not leave the padding in front of a row out" in capsys.readouterr().err


def test_positions_that_count_otherwise() -> None:
    model = initialised(RobertaForCausalLM, RobertaConfig(**SMALL, num_attention_heads=4, is_decoder=True))
    with pytest.raises(DataError, match=r"so that losses would depend on what else is in the batch"):
        check(model, positions=True)
