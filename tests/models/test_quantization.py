"""Quantised bases: bitsandbytes' matrices of 4 bits, on the CPU."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from tests.config.examples import VALID, problems_of
from tests.tiny import save_model_folder, tiny_bert_classifier, tiny_llama
from vamo_ft.config.model import AdapterConfig, ModelConfig, QuantizationConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models import loading
from vamo_ft.models.four_bits import check_outline, four_bit_bytes, four_bits
from vamo_ft.models.loading import LoadedModel, load_model, load_outline

NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0),
)
"""arXiv 2305.14314, appendix E."""
FP4 = tuple(sign * value / 12 for value in (0, 0.0625, 2, 3, 4, 6, 8, 12) for sign in (1, -1))
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model_folder(tmp_path / "base", tiny_llama(hidden=64))


def configured(base: Path, dtype: Any = "bfloat16", **changes: Any) -> ModelConfig:
    quantization = QuantizationConfig(bits=4, **changes)
    return ModelConfig(path=str(base), dtype=dtype, quantization=quantization, adapter=AdapterConfig(type="lora"))


def rounded(weight: Tensor, code: tuple[float, ...]) -> Tensor:
    """Each block of 64 weights: its largest magnitude, times the nearest of 16 values."""
    blocks = weight.detach().double().reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(code, dtype=torch.float64)
    nearest = (blocks / scales).unsqueeze(-1).sub(values).abs().argmin(-1)
    return (values[nearest] * scales).view(weight.shape)


def quantised(model: nn.Module) -> dict[str, Any]:
    """The matrices in 4 bits, by the names that they have without an adapter."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer"): m for name, m in modules.items()}


def planned(outline: LoadedModel) -> set[str]:
    """The same names, of those that are counted before anything is loaded."""
    assert outline.four_bits is not None
    return {*outline.four_bits.matrices}


@pytest.mark.parametrize(("kind", "code"), [("nf4", NF4), ("fp4", FP4)])
def test_the_loss_is_that_of_matrices_rounded_to_the_code(base: Path, kind: str, code: tuple[float, ...]) -> None:
    config = configured(base, "float32", type=kind, double_quant=False, compute_dtype="float32")
    loaded = load_model(config, offline=True, seed=1).model
    plain = tiny_llama(hidden=64)
    before = plain(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        for name in quantised(loaded):
            weight = plain.get_submodule(name).weight
            weight.copy_(rounded(weight, code))
    expected = plain(input_ids=IDS, labels=IDS).loss
    assert abs(expected - before) > 1e-5
    torch.testing.assert_close(loaded.eval()(input_ids=IDS, labels=IDS).loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
def test_matrices_and_bytes_are_those_that_are_planned(base: Path, double_quant: bool) -> None:
    config = configured(base, double_quant=double_quant)
    found = quantised(load_model(config, offline=True, seed=1).model)
    assert planned(load_outline(config, offline=True)) == found.keys()
    assert len(found) == 7 * 2
    for module in found.values():
        state = module.weight.quant_state
        held = module.weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double_quant else 0)
        assert held == four_bit_bytes(state.shape.numel(), double_quant=double_quant)


@pytest.mark.parametrize("head", ["new", "saved"])
def test_a_classifier_head_with_a_bias_is_trained_as_it_is(tmp_path: Path, head: str) -> None:
    """transformers keeps the last module in full only where its last parameter is a weight."""
    classifier = tiny_bert_classifier(hidden=64)
    saved = save_model_folder(tmp_path / "bert", classifier if head == "saved" else classifier.base_model)
    adapter = AdapterConfig(type="lora", target_modules=["query"])
    config = configured(saved, "float32").model_copy(update={"task": "sequence_classification", "adapter": adapter})
    loaded = load_model(config, offline=True, seed=1, num_labels=2).model
    outline = load_outline(config, offline=True, num_labels=2, modules_to_save=["classifier"])
    assert quantised(loaded).keys() == planned(outline)
    assert len(planned(outline)) == 6 * 2
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad and "lora_" not in name}
    prefix = "base_model.model.classifier.modules_to_save.default"
    assert trained == {f"{prefix}.weight", f"{prefix}.bias"}
    loaded(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert float(loaded.get_parameter(f"{prefix}.weight").grad.norm()) > 0
    if head == "saved":
        assert torch.equal(loaded.get_parameter(f"{prefix}.weight"), classifier.classifier.weight)


def test_layers_that_an_adapter_trains_in_full_are_not_quantised(base: Path) -> None:
    adapter = AdapterConfig(
        type="lora", target_modules=["q_proj"], modules_to_save=["mlp", "layers.1.self_attn.v_proj"]
    )
    config = configured(base).model_copy(update={"adapter": adapter})
    loaded = load_model(config, offline=True, seed=1).model
    assert quantised(loaded).keys() == planned(load_outline(config, offline=True))
    assert len(quantised(loaded)) == 4 * 2 - 1
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    in_full = {name: p for name, p in loaded.named_parameters() if "modules_to_save" in name}
    assert len(in_full) == 3 * 2 + 1
    assert all(p.grad is not None and p.dtype == torch.bfloat16 for p in in_full.values())


def test_weights_in_four_bits_count_one_by_one(base: Path) -> None:
    """bitsandbytes holds two of them in an element."""
    config = configured(base)
    loaded = load_model(config, offline=True, seed=1)
    plain = load_model(config.model_copy(update={"quantization": None}), offline=True, seed=1)
    assert loaded.numel == plain.numel == sum(p.numel() for p in plain.model.parameters())


def test_a_model_without_a_stack_of_layers_is_quantised_around_its_head(tmp_path: Path) -> None:
    """A list of one layer is no stack: nothing tells it from other lists."""
    model = tiny_llama(hidden=64)
    model.config.num_hidden_layers = 1
    del model.model.layers[1]
    single = save_model_folder(tmp_path / "single", model)
    loaded = load_model(configured(single), offline=True, seed=1).model
    assert quantised(loaded).keys() == planned(load_outline(configured(single), offline=True))
    assert {name.partition(".layers.0.")[0] for name in quantised(loaded)} == {"model"}
    assert len(quantised(loaded)) == 7
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_a_model_without_matrices_is_refused(base: Path) -> None:
    adapter = AdapterConfig(type="lora", target_modules=["embed_tokens"], modules_to_save=["self_attn", "mlp"])
    config = configured(base).model_copy(update={"adapter": adapter})
    held = load_outline(config, offline=True).four_bits
    assert held is not None
    said = r"^model\.quantization: {}: the model has no matrices to quantise; leave it out$"
    with pytest.raises(DataError, match=said.format("here")):
        check_outline(held, path="here", on_cpu=False)
    with pytest.raises(DataError, match=said.format(".*base")):
        load_model(config, offline=True, seed=1)


def test_what_is_not_quantised_has_the_configured_precision(base: Path) -> None:
    model = load_model(configured(base), offline=True, seed=1).model
    kept = {p.dtype for p in model.parameters() if not p.requires_grad and p.dtype != torch.uint8}
    assert kept == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "the adapter stays in float32"


def test_an_evaluation_changes_no_gradient(base: Path) -> None:
    """bitsandbytes would repack the matrices for inference, where the processor multiplies bfloat16."""
    model = load_model(configured(base), offline=True, seed=1).model

    def gradients() -> list[Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    after = gradients()
    assert len(before) == len(after) == 2 * 7 * 2
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(float(gradient.norm()) > 0 for gradient in before)


def test_weights_are_quantised_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantizationConfig(bits=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert four_bits(config, kept=[])["device_map"] == {"": "cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert four_bits(config, kept=[])["device_map"] == {"": 3}


def test_a_matrix_that_the_cpu_would_misread_is_refused(tmp_path: Path) -> None:
    """bitsandbytes reads the scales of rows that do not end with a block from the wrong place."""
    narrow = save_model_folder(tmp_path / "narrow", tiny_llama())
    said = (
        r"^model\.quantization: .*narrow: model\.layers\.0\.self_attn\.q_proj has rows of 32 weights, and on the CPU "
        r"they must be multiples of 64; take weights that are not quantised, or run on CUDA$"
    )
    with pytest.raises(DataError, match=said):
        load_model(configured(narrow), offline=True, seed=1)
    outline = load_outline(configured(narrow), offline=True).four_bits
    assert outline is not None
    with pytest.raises(DataError, match=said):
        check_outline(outline, path="narrow", on_cpu=True)
    check_outline(outline, path="narrow", on_cpu=False)


def test_a_missing_package_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^model\.quantization: needs .*: pip install 'vamo-ft\[bitsandbytes\]'$"):
        load_model(configured(base), offline=True, seed=1)


def test_contradictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantized = "model.quantization={bits: 4}"
    adapter = "model.adapter={type: lora}"
    assert problems_of(VALID, quantized, adapter) == []
    assert "quantised weights are not trained; add model.adapter" in problems_of(VALID, quantized)[0]
    assert "a .gguf file is dequantised" in problems_of(VALID, quantized, adapter, "model.path=a.gguf")[0]
    forward = ("method.name=forward_gradient", "model.attn_implementation=eager", "optimizer.name=sgd")
    assert problems_of(VALID, adapter, *forward) == []
    (problem,) = problems_of(VALID, quantized, adapter, *forward)
    assert problem.endswith(
        "model.quantization: method.name: forward_gradient takes forward derivatives, which products with weights in 4 "
        "bits have none of on CUDA; leave it out"
    )
    assert "must be 4" in problems_of(VALID, adapter, "model.quantization={bits: 3}")[0]


def test_a_frozen_weight_takes_what_the_readme_says() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert "(QLoRA) a frozen weight takes 0.52 bytes" in text
    numel = 4096 * 4096
    assert four_bit_bytes(numel, double_quant=True) / numel == pytest.approx(0.52, abs=0.005)
    saved_bits = 8 * (four_bit_bytes(numel, double_quant=False) - four_bit_bytes(numel, double_quant=True)) / numel
    assert saved_bits == pytest.approx(0.373, abs=0.001)  # arXiv 2305.14314, section 3
    assert four_bit_bytes(65, double_quant=False) == 33 + 2 * 4
    assert four_bit_bytes(64 * 256 + 1, double_quant=True) == 32 * 256 + 1 + 257 + 2 * 4
