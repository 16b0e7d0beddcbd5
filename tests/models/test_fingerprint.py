"""What changes the hashes of a base model and its tokenizer, and what does not."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer, save_model_folder, tiny_llama
from vamo_ft.config.model import ModelConfig
from vamo_ft.models import fingerprint
from vamo_ft.models.fingerprint import base_fingerprint, tokenizer_fingerprint


def config(path: Path | str) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(path)})


def test_a_folder_is_known_again_wherever_it_lies(tmp_path: Path) -> None:
    first = base_fingerprint(config(save_model_folder(tmp_path / "a", tiny_llama())))
    second = base_fingerprint(config(save_model_folder(tmp_path / "b", tiny_llama())))
    assert first is not None
    assert second is not None
    assert {**first, "path": 0} == {**second, "path": 0}
    assert first["path"] == str(tmp_path / "a")
    assert first["commit"] is None
    other = base_fingerprint(config(save_model_folder(tmp_path / "c", tiny_llama(seed=1))))
    assert other is not None
    assert [key for key in first if first[key] != other[key]] == ["path", "weights"]


def test_what_is_not_here_has_none(tmp_path: Path) -> None:
    assert base_fingerprint(config(tmp_path / "nothing")) is None
    assert base_fingerprint(config("owner/never-downloaded")) is None
    (tmp_path / "config.json").write_text("{}")
    assert base_fingerprint(config(tmp_path)) is None, "a configuration without weights"


def test_a_hub_model_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model_folder(tmp_path / "snapshots" / "c0ffee", tiny_llama())
    monkeypatch.setattr(fingerprint, "try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    facts, local = base_fingerprint(config("owner/name")), base_fingerprint(config(folder))
    assert facts is not None
    assert local is not None
    assert (facts["path"], facts["commit"]) == ("owner/name", "c0ffee")
    assert facts["weights"] == local["weights"]


def test_a_large_file_is_sampled_at_both_ends_and_between(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.truncate(50 * 2**30)  # takes no room on the disk
    began = time.process_time()
    seen = [base_fingerprint(config(path))]
    assert time.process_time() - began < 1
    for place in (0, 2**16 - 1, path.stat().st_size - 1, (path.stat().st_size - 2**16) // 15 * 7 + 100):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.append(base_fingerprint(config(path)))
    os.truncate(path, path.stat().st_size - 1)
    seen.append(base_fingerprint(config(path)))
    hashes = [facts["weights"] for facts in seen if facts is not None]
    assert len(set(hashes)) == len(seen) == 6


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = bytearray(200_000)
    hashes = set()
    for place in range(0, len(content), 9_999):
        content[place] ^= 1
        path.write_bytes(content)
        facts = base_fingerprint(config(path))
        assert facts is not None
        hashes.add(facts["weights"])
    assert len(hashes) == len(range(0, len(content), 9_999))


CHANGES: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "chat template": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
    "special token": lambda tokenizer: setattr(tokenizer, "eos_token", "<s>"),
    "vocabulary": lambda tokenizer: tokenizer.add_tokens(["new"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_tokenizer_differs(name: str) -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    CHANGES[name](tokenizer)
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_tokenizer_is_the_same_after_use_and_when_loaded_again(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    before = tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path))
    again = AutoTokenizer.from_pretrained(tmp_path)
    again(["a", "b c"], padding="max_length", max_length=8, truncation=True)
    assert tokenizer_fingerprint(again) == before
    again.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "again")) == before


def test_a_tokenizer_that_cannot_be_loaded_is_another_one(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path, tiny_llama())
    (folder / "tokenizer.json").write_text("{")
    facts = base_fingerprint(config(folder))
    assert facts is not None
    assert facts["tokenizer"] is None
