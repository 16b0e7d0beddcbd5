"""Bases whose files hold weights in 4 bits, as bitsandbytes through transformers has written them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_quantization import IDS, planned, quantised
from tests.tiny import save_in_four_bits, save_model_folder, tiny_gpt2, tiny_llama
from vamo_ft.config.model import AdapterConfig, ModelConfig, QuantizationConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models import loading
from vamo_ft.models.four_bits import four_bit_bytes
from vamo_ft.models.loading import LoadedModel, load_model, load_outline


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model_folder(tmp_path / "base", tiny_llama(hidden=64))


@pytest.fixture
def stored(base: Path) -> Path:
    return save_in_four_bits(base.with_name("stored"), base)


def configured(path: Path, quantization: QuantizationConfig | None = None, **adapter: Any) -> ModelConfig:
    return ModelConfig(
        path=str(path), dtype="bfloat16", quantization=quantization, adapter=AdapterConfig(type="lora", **adapter)
    )


def loaded(config: ModelConfig, **changes: Any) -> LoadedModel:
    return load_model(config, offline=True, seed=1, **changes)


def change_settings(folder: Path, **changes: Any) -> None:
    """In the quantization_config of its config.json; None removes it."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    settings = {**content.get("quantization_config", {}), **changes}
    path.write_text(json.dumps({**content, "quantization_config": settings}))


def losses_and_gradients(model: torch.nn.Module) -> list[Tensor]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
        evaluated = model.eval()(input_ids=IDS, labels=IDS).loss  # where bitsandbytes would repack the matrices
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [evaluated, loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_it_is_the_model_that_is_quantised_when_loaded(base: Path, kind: Any, double: bool) -> None:
    """Bit for bit, in losses, gradients and bytes."""
    quantization = QuantizationConfig(bits=4, type=kind, double_quant=double)
    stored = save_in_four_bits(base.with_name("stored"), base, kind=kind, double=double)
    expected, found = loaded(configured(base, quantization)), loaded(configured(stored))
    assert found.four_bits is not None
    assert found.four_bits.config == quantization
    assert found.four_bits.stored
    assert found.numel == expected.numel
    pairs = zip(losses_and_gradients(found.model), losses_and_gradients(expected.model), strict=True)
    equal = [torch.equal(*pair) for pair in pairs]
    assert all(equal)
    assert len(equal) == 2 + 2 * 7 * 2
    modules = quantised(found.model)
    assert planned(load_outline(configured(stored), offline=True)) == modules.keys()
    assert planned(found) == modules.keys() == quantised(expected.model).keys()
    for name, module in modules.items():
        state = module.weight.quant_state
        held = module.weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
        rows, columns = found.four_bits.matrices[name]
        assert held == four_bit_bytes(rows * columns, double_quant=double)
        assert (rows, columns) == tuple(state.shape)


@pytest.mark.parametrize(
    ("skipped", "count"),
    [(None, 14), (["lm_head"], 14), ([], 15), (["lm_head", "model.layers.1.self_attn", "mlp.up_proj"], 8)],
)
def test_the_modules_that_were_left_out_are_in_full(base: Path, skipped: list[str] | None, count: int) -> None:
    stored = save_in_four_bits(base.with_name("stored"), base, skipped=skipped)
    found = quantised(loaded(configured(stored)).model)
    assert found.keys() == planned(load_outline(configured(stored), offline=True))
    assert len(found) == count


def test_tied_embeddings_and_transposed_matrices(tmp_path: Path) -> None:
    base = save_model_folder(tmp_path / "base", tiny_gpt2(hidden=64))
    stored = save_in_four_bits(tmp_path / "stored", base)
    config = configured(stored, target_modules=["c_attn"])
    model, outline = loaded(config), load_outline(config, offline=True)
    assert quantised(model.model).keys() == planned(outline)
    assert outline.four_bits is not None
    assert outline.four_bits.matrices["transformer.h.0.attn.c_attn"] == (3 * 64, 64)
    expected = loaded(configured(base, QuantizationConfig(bits=4), target_modules=["c_attn"]))
    pairs = zip(losses_and_gradients(model.model), losses_and_gradients(expected.model), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("written", "taken"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")]
)
def test_the_precision_of_products_is_the_stored_one_where_none_is_given(
    stored: Path, written: str, taken: str
) -> None:
    change_settings(stored, bnb_4bit_compute_dtype=written)
    for quantization, expected in ((None, taken), (QuantizationConfig(bits=4, compute_dtype="float32"), "float32")):
        model = loaded(configured(stored, quantization))
        assert model.four_bits is not None
        assert model.four_bits.config.compute_dtype == expected
        assert {str(module.compute_dtype) for module in quantised(model.model).values()} == {f"torch.{expected}"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_quantised_has_the_configured_precision(base: Path, dtype: Any) -> None:
    """Whatever it was stored in; transformers leaves it."""
    stored = save_in_four_bits(base.with_name("stored"), base, dtype=torch.float16, storage=torch.bfloat16)
    config = configured(stored).model_copy(update={"dtype": dtype})
    found = loaded(config)
    assert found.four_bits is not None
    assert found.four_bits.decoded == torch.float16
    others = {p.dtype for p in found.model.parameters() if not p.requires_grad and not hasattr(p, "quant_state")}
    assert others == {getattr(torch, dtype)}
    assert {p.dtype for p in found.model.parameters() if hasattr(p, "quant_state")} == {torch.bfloat16}
    assert found.numel == load_outline(config, offline=True).numel
    assert losses_and_gradients(found.model)[0].isfinite()
    plain = loaded(config, decoded=True)
    assert {p.dtype for p in plain.model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    assert not quantised(plain.model)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            {"type": "fp4"},
            r"^model\.quantization\.type: fp4 contradicts .*stored, whose weights are stored with nf4; write nf4, or "
            r"leave model\.quantization out$",
        ),
        (
            {"double_quant": False},
            r"^model\.quantization\.double_quant: false contradicts .*stored, whose weights are stored with true; "
            r"write true, or leave model\.quantization out$",
        ),
    ],
)
def test_a_contradiction_is_refused(stored: Path, written: dict[str, Any], said: str) -> None:
    config = configured(stored, QuantizationConfig(bits=4, **written))
    for load in (lambda: loaded(config), lambda: load_outline(config, offline=True)):
        with pytest.raises(DataError, match=said):
            load()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"load_in_8bit": True}, "bitsandbytes in 8 bits"),
    ],
)
@pytest.mark.parametrize("quantization", [None, QuantizationConfig(bits=4)])
def test_other_ways_of_quantisation_are_refused(
    base: Path, settings: dict[str, Any], name: str, quantization: QuantizationConfig | None
) -> None:
    change_settings(base, **settings)
    said = (
        rf"^model\.path: .*base: its weights are quantised by {name} \(quantization_config in config\.json\), and "
        r"adapters are trained on bitsandbytes' 4 bits alone; write the model that they were made from, and "
        r"model\.quantization for weights of 4 bits$"
    )
    config = configured(base, quantization)
    for load in (lambda: loaded(config), lambda: load_outline(config, offline=True)):
        with pytest.raises(DataError, match=said):
            load()


def test_layers_in_four_bits_are_not_trained_in_full(stored: Path) -> None:
    said = (
        r"^model\.adapter\.modules_to_save: 'mlp' is stored in 4 bits, and quantised weights are not trained; leave it "
        r"out, or write the model that .*stored was made from, and model\.quantization$"
    )
    config = configured(stored, target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"])
    for load in (lambda: loaded(config), lambda: load_outline(config, offline=True)):
        with pytest.raises(DataError, match=said):
            load()
    model = loaded(configured(stored, target_modules=["q_proj"], modules_to_save=["lm_head"])).model
    model(input_ids=IDS, labels=IDS).loss.backward()
    (head,) = (p for name, p in model.named_parameters() if "lm_head.modules_to_save" in name)
    assert head.grad is not None


@pytest.mark.parametrize("skipped", [None, ["lm_head"]])
def test_a_new_classifier_head_is_trained_in_full(base: Path, skipped: list[str] | None) -> None:
    stored = save_in_four_bits(base.with_name("stored"), base, skipped=skipped)
    config = configured(stored).model_copy(update={"task": "sequence_classification"})
    model = loaded(config, num_labels=2)
    outline = load_outline(config, offline=True, num_labels=2, modules_to_save=["score"])
    assert quantised(model.model).keys() == planned(outline)
    assert len(planned(outline)) == 14
    model.model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert model.model.get_parameter("base_model.model.score.modules_to_save.default.weight").grad is not None


def test_a_matrix_that_the_cpu_would_misread_is_refused(tmp_path: Path) -> None:
    base = save_model_folder(tmp_path / "base", tiny_llama())
    narrow = save_in_four_bits(tmp_path / "narrow", base)
    said = r"^model\.quantization: .*narrow: model\.layers\.0\.self_attn\.q_proj has rows of 32 weights, and on the CPU"
    with pytest.raises(DataError, match=said):
        loaded(configured(narrow))


def test_a_missing_package_is_named(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^model\.path: .*stored: needs .*: pip install 'vamo-ft\[bitsandbytes\]'$"):
        loaded(configured(stored))


def test_it_answers_without_an_adapter(stored: Path) -> None:
    """As `generate` and `evaluate` of the base ask it to; the run refuses to train it."""
    model = loaded(ModelConfig(path=str(stored), dtype="bfloat16"))
    assert len(quantised(model.model)) == 14
    with torch.no_grad():
        assert model.model(input_ids=IDS).logits.isfinite().all()
