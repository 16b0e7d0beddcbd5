import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.tiny import (
    Planted,
    byte_tokenizer,
    save_model_folder,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    without_special_tokens,
)
from vamo_ft.config.model import ModelConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models.export import save_model
from vamo_ft.models.loading import LoadedModel, load_model

LORA = {"type": "lora", "r": 2}
CLASSIFIER = {"task": "sequence_classification"}


def load(
    path: Path | str, *, seed: int = 1, num_labels: int | None = None, weights: Path | None = None, **keys: Any
) -> LoadedModel:
    config = ModelConfig(path=str(path), **keys)
    return load_model(config, offline=True, seed=seed, num_labels=num_labels, weights=weights)


def logits(model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    inputs = tokenizer(["a cat", "a longer cat"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def change_trainable(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model_folder(tmp_path / "llama", tiny_llama())


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("build", "num_labels", "dtype"),
    [
        (tiny_llama, None, "float32"),
        (tiny_llama, None, "bfloat16"),
        (lambda: tiny_llama(tied=True), None, "float32"),
        (tiny_gpt2, None, "float32"),
        (tiny_llama, 3, "float32"),
        (lambda: tiny_llama_classifier(num_labels=3), 3, "bfloat16"),
        (lambda: tiny_bert_classifier(num_labels=3), 3, "float32"),
    ],
    ids=["llama", "llama-bfloat16", "tied", "gpt2", "llama-new-head", "llama-classifier", "bert-classifier"],
)
def test_round_trip_is_bit_identical(
    tmp_path: Path,
    build: Callable[[], PreTrainedModel],
    num_labels: int | None,
    dtype: str,
    adapter: dict[str, Any] | None,
) -> None:
    base = save_model_folder(tmp_path / "base", build())
    task = "causal_lm" if num_labels is None else "sequence_classification"
    keys = {"task": task, "num_labels": num_labels, "adapter": adapter, "dtype": dtype}
    first = load(base, seed=1, **keys)
    change_trainable(first.model)
    save_model(first.model, first.tokenizer, tmp_path / "saved")
    second = load(base, seed=2, weights=tmp_path / "saved", **keys)
    before = {name: p for name, p in first.model.named_parameters() if p.requires_grad}
    after = {name: p for name, p in second.model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert parameter.dtype == after[name].dtype
        assert torch.equal(parameter, after[name]), name
    assert torch.equal(logits(first.model, first.tokenizer), logits(second.model, second.tokenizer))
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert second.tokenizer.pad_token_id == second.model.config.pad_token_id == 0


def test_values_are_those_of_transformers(llama: Path) -> None:
    loaded = load(llama)
    assert torch.equal(
        logits(loaded.model, loaded.tokenizer), logits(AutoModelForCausalLM.from_pretrained(llama), byte_tokenizer())
    )
    assert loaded.model.config.use_cache is False
    assert loaded.accepts_position_ids
    assert loaded.accepts_logits_to_keep


def test_classifier_takes_no_logits_to_keep(tmp_path: Path) -> None:
    loaded = load(
        save_model_folder(tmp_path / "base", tiny_bert_classifier()), num_labels=2, adapter=LORA, **CLASSIFIER
    )
    assert loaded.accepts_position_ids
    assert not loaded.accepts_logits_to_keep


def test_precision(llama: Path) -> None:
    model = load(llama, dtype="bfloat16", adapter=LORA).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("written", "used"), [({}, "sdpa"), ({"attn_implementation": "eager"}, "eager")])
def test_attention_is_sdpa_unless_another_is_written(written: dict[str, Any], used: str, llama: Path) -> None:
    assert load(llama, **written).model.config._attn_implementation == used


def test_new_head_and_adapter_come_from_the_seed_alone(llama: Path) -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed)  # moves the global state
        model = load(llama, seed=seed, num_labels=2, adapter=LORA, **CLASSIFIER).model
        return {name: p for name, p in model.named_parameters() if "score" in name or "lora_A" in name}

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(llama, num_labels=2, adapter=LORA, **CLASSIFIER)
    assert torch.equal(torch.rand(3), expected)
    one, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_pad_falls_back_to_eos_whose_row_still_learns(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    for again in (loaded, load(tmp_path / "base", weights=tmp_path / "saved")):
        assert again.tokenizer.pad_token == "</s>"
        assert again.model.config.pad_token_id == 2
        assert again.model.get_input_embeddings().weight.shape == (259, 32)
        again.model(input_ids=torch.tensor([[5, 2, 7]])).logits.square().sum().backward()
        assert again.model.get_input_embeddings().weight.grad[2].abs().sum() > 0


def test_pad_token_beyond_the_embedding_is_not_used(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer.pad_token == "</s>"


def test_new_pooler_is_trained_and_saved_with_the_adapter(tmp_path: Path) -> None:
    BertModel(tiny_bert_classifier().config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    keys = {"num_labels": 2, "adapter": LORA, **CLASSIFIER}
    first = load(tmp_path / "base", seed=1, **keys)
    change_trainable(first.model)
    save_model(first.model, first.tokenizer, tmp_path / "saved")
    assert any("pooler" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    second = load(tmp_path / "base", seed=2, weights=tmp_path / "saved", **keys)
    assert torch.equal(logits(first.model, first.tokenizer), logits(second.model, second.tokenizer))


def test_finished_run_needs_its_base_no_more(llama: Path, tmp_path: Path) -> None:
    first = load(llama, num_labels=2, **CLASSIFIER)
    save_model(first.model, first.tokenizer, tmp_path / "saved")
    second = load("/no/such/folder", num_labels=2, weights=tmp_path / "saved", **CLASSIFIER)
    assert torch.equal(logits(first.model, first.tokenizer), logits(second.model, second.tokenizer))
    _without("score.weight")(tmp_path / "saved")
    with pytest.raises(DataError, match=r"the weights lack 1 tensors, such as score\.weight"):
        load(llama, num_labels=2, weights=tmp_path / "saved", **CLASSIFIER)


def test_pickles_are_never_opened(llama: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    planted = pickle.dumps(Planted(trace))
    pickle.loads(planted)
    assert trace.exists(), "the planted pickle must work"
    trace.unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (llama / name).write_bytes(planted)
    load(llama)
    saved = tmp_path / "saved"
    adapted = load(llama, adapter=LORA)
    save_model(adapted.model, adapted.tokenizer, saved)
    (saved / "adapter_model.safetensors").rename(tmp_path / "aside")
    (saved / "adapter_model.bin").write_bytes(planted)
    with pytest.raises(DataError, match=r"has no adapter_model\.safetensors"):
        load(llama, adapter=LORA, weights=saved)
    (llama / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no model\.safetensors; .*pickled \.bin, are not opened"):
        load(llama)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(DataError, match="not a safetensors file"):
        load(llama)
    (llama / "model.safetensors.index.json").unlink()
    config = json.loads((llama / "config.json").read_text())
    tiny_llama().save_pretrained(llama)
    (llama / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(DataError, match="names its own weights file"):
        load(llama)
    assert not trace.exists()


def _without(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _reshaped(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "never_heard_of"}')


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_without("lm_head.weight"), "the weights lack 1 tensors, such as lm_head.weight"),
        (_reshaped, r"model.norm.weight has shape \(7,\) in the weights and \(32,\) in the model"),
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder: it has no config.json"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
            r"llama/model\.safetensors: is not an intact safetensors file",
        ),
        (lambda folder: (folder / "adapter_config.json").touch(), "holds an adapter, not a whole model"),
        (_unknown_type, "never_heard_of"),
        (without_special_tokens, "the tokenizer has no pad, eos or unk token"),
    ],
)
def test_bad_folder_is_told_in_one_line(llama: Path, edit: Callable[[Path], None], message: str) -> None:
    edit(llama)
    with pytest.raises(DataError, match=message) as caught:
        load(llama)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "model.path: /no/such/folder: there is no such folder"),
        ("./missing", "there is no such folder"),
        ("two words", "there is no such folder, and it is not a Hub id"),
        ("missing/model.gguf", "missing/model.gguf: there is no such file"),
        ("nobody/nothing", "is not in the Hugging Face cache, and run.offline is true"),
    ],
)
def test_missing_model_is_told_in_one_line(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'vamo-ft\[gguf\]'"):
        load(tmp_path / "model.gguf")


def test_classifier_with_another_number_of_labels(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "base", tiny_llama_classifier(num_labels=3))
    with pytest.raises(DataError, match=r"has 3 labels and data\.format\.labels has 2"):
        load(folder, num_labels=2, **CLASSIFIER)


def test_adapter_of_another_model(llama: Path, tmp_path: Path) -> None:
    adapted = load(llama, adapter=LORA)
    save_model(adapted.model, adapted.tokenizer, tmp_path / "saved")
    weights = tmp_path / "saved" / "adapter_model.safetensors"
    tensors = load_file(weights)
    first, second = sorted(tensors)[:2]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    with pytest.raises(DataError, match=f"does not fit the model: {first} is only in one of them"):
        load(llama, adapter=LORA, weights=tmp_path / "saved")
    save_file({**tensors, second: torch.zeros(3, 3)}, weights)
    with pytest.raises(DataError, match=r"does not fit the model: .*size mismatch"):
        load(llama, adapter=LORA, weights=tmp_path / "saved")


def test_loading_and_saving_print_nothing(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    loaded = load(llama, num_labels=2, **CLASSIFIER)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_cached_hub_model_loads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = []

    def look_up(*arguments: Any, **_: Any) -> None:
        lookups.append(arguments)
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    cached = tmp_path / "models--org--name"
    save_model_folder(cached / "snapshots" / ("a" * 40), tiny_llama())
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    loaded = load("org/name", adapter=LORA)
    assert loaded.model.peft_config["default"].base_model_name_or_path == "org/name"
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    load("org/name", adapter=LORA, weights=tmp_path / "saved")
    with pytest.raises(DataError, match="org/name: is not in the Hugging Face cache"):
        load("org/name", revision="v2")
    assert len(lookups) <= 1  # one is huggingface_hub's own, which only HF_HUB_OFFLINE stops


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("VAMO_FT_TEST_GGUF" not in os.environ, reason="VAMO_FT_TEST_GGUF names no .gguf file")
def test_gguf(tmp_path: Path) -> None:
    path = Path(os.environ["VAMO_FT_TEST_GGUF"])
    loaded = load(path)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "full")
    expected = logits(loaded.model, loaded.tokenizer)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32), loaded.tokenizer), expected
    )
    again = load(path, weights=tmp_path / "full")
    assert torch.equal(logits(again.model, again.tokenizer), expected)
    del again, loaded
    adapted = load(path, adapter=LORA)
    change_trainable(adapted.model)
    save_model(adapted.model, adapted.tokenizer, tmp_path / "adapter")
    expected = logits(adapted.model, adapted.tokenizer)
    del adapted
    again = load(path, adapter=LORA, weights=tmp_path / "adapter")
    assert torch.equal(logits(again.model, again.tokenizer), expected)


def test_exported_classifier_loads_with_transformers(tmp_path: Path) -> None:
    base = save_model_folder(tmp_path / "base", tiny_llama())
    loaded = load(base, num_labels=3, **CLASSIFIER)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(plain, loaded.tokenizer), logits(loaded.model, loaded.tokenizer))
