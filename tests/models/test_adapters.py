from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_gpt2, tiny_llama, tiny_llama_classifier
from vamo_ft.config.model import ModelConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models.adapters import add_adapter, freeze, load_adapter
from vamo_ft.models.export import quietly


def config(*, task: str = "causal_lm", **adapter: Any) -> ModelConfig:
    return ModelConfig(path="org/name", task=task, adapter={"type": "lora", "r": 2, **adapter})


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def add(model: Any, model_config: ModelConfig) -> Any:
    with quietly():
        return add_adapter(model, model_config)


def test_only_the_named_layers_are_adapted() -> None:
    model = add(tiny_llama(), config(target_modules=["q_proj", "v_proj"]))
    assert trainable(model) == {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{matrix}.default.weight"
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
        for matrix in "AB"
    }


def test_all_linear_leaves_the_output_layer_alone() -> None:
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(add(tiny_llama(), config()))}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(add(tiny_gpt2(), config()))}
    assert adapted == {"c_attn", "c_proj", "c_fc"}


def test_classifier_head_is_trained_in_full() -> None:
    names = trainable(add(tiny_llama_classifier(), config(task="sequence_classification", target_modules=["q_proj"])))
    assert {name for name in names if "lora" not in name} == {"base_model.model.score.modules_to_save.default.weight"}


def test_modules_to_save_are_trained_in_full() -> None:
    names = trainable(add(tiny_llama(), config(target_modules=["q_proj"], modules_to_save=["lm_head"])))
    assert {name for name in names if "lora" not in name} == {"base_model.model.lm_head.modules_to_save.default.weight"}


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_update_has_the_documented_scale(use_rslora: bool, scale: float) -> None:
    model = add(tiny_llama(), config(r=4, alpha=16, target_modules=["q_proj"], use_rslora=use_rslora))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
        expected = x @ layer.base_layer.weight.T + scale * (x @ a.T @ b.T)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["query"]}, "model.adapter.target_modules: 'query' matches no layer"),
        ({"target_modules": ["q_proj", "proj"]}, "model.adapter.target_modules: 'proj' matches no layer"),
        ({"target_modules": ["mlp"]}, "model.adapter.target_modules: 'mlp' matches no layer"),
        ({"modules_to_save": ["head"]}, "model.adapter.modules_to_save: 'head' matches no layer"),
    ],
)
def test_name_that_matches_nothing(adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"{message}.* its layers are embed_tokens, q_proj, .*down_proj, lm_head$"):
        add_adapter(tiny_llama(), config(**adapter))


def test_freeze() -> None:
    model = tiny_llama()
    freeze(model, ["*embed*", "model.layers.0.*"])
    assert all(name.startswith(("model.layers.1.", "model.norm", "lm_head")) for name in trainable(model))
    assert len(trainable(model)) == 9 + 2


def test_freeze_within_an_adapter_uses_the_models_own_names() -> None:
    model = add(tiny_llama(), config(target_modules=["q_proj"]))
    freeze(model, ["model.layers.0.*"])
    assert len(trainable(model)) == 2
    assert all(".layers.1." in name for name in trainable(model))


def test_freeze_that_matches_nothing() -> None:
    with pytest.raises(DataError, match=r"'layers\.0' matches no parameter; there are 21, such as model.embed_tokens"):
        freeze(tiny_llama(), ["layers.0"])


def test_freeze_of_everything() -> None:
    with pytest.raises(DataError, match="nothing is left to train"):
        freeze(tiny_llama(), ["*"])


def test_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no adapter_config\.json"):
        load_adapter(tiny_llama(), tmp_path, base="org/name")
