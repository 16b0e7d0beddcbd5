"""Tokens that are kept between runs: when they are found, what they are, and what damage does."""

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import byte_tokenizer, sentiment_rows, write_jsonl
from vamo_ft.config.data import DataConfig
from vamo_ft.core.errors import StopRequested
from vamo_ft.data import cache as cache_module
from vamo_ft.data.cache import TokenCache, cache_folder
from vamo_ft.data.examples import TokenizedData, TokenWriter
from vamo_ft.data.loading import load_samples
from vamo_ft.models.fingerprint import tokenizer_fingerprint

PAIRS = {"type": "prompt_completion", "prompt": "{sentence}", "completion": " {label}"}
WORDS = {"type": "classification", "template": "{sentence}", "labels": {0: " bad", 1: " good"}}


def rich_data() -> TokenizedData:
    """Every kind of field, some of them empty."""
    writer = TokenWriter()
    writer.append([5, 6, 7], ((1, 2), (2, 3)), label=1, options=((7,), (8, 9)), references=("a", "ü\u2028"))
    writer.append([8], (), truncated=True)
    writer.append([1, 2, 3, 4], ((1, 4),), documents=(2, 4), rows=(4, 2))
    writer.skip()
    return writer.finish()


def never() -> TokenizedData:
    raise AssertionError("tokenized although it was in the cache")


@pytest.mark.parametrize("build", [rich_data, lambda: TokenWriter().finish()])
def test_what_comes_back_is_what_was_kept(tmp_path: Path, build: Callable[[], TokenizedData]) -> None:
    cache = TokenCache(tmp_path, "tokenizer")
    made = cache.data({"rows": 1}, build)
    found = cache.data({"rows": 1}, never)
    assert found == made == build()
    assert found.fingerprint == made.fingerprint
    assert [found[index] for index in range(len(found))] == [made[index] for index in range(len(made))]
    assert {type(value) for value in vars(found).values()} == {type(value) for value in vars(made).values()}
    [entry] = (tmp_path / "tokens").iterdir()
    assert {file.name for file in entry.iterdir()} == {"tokens.safetensors", "entry.json"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tokenized."""
    from vamo_ft.data import loading

    found: list[str] = []
    original = loading._tokenize_rows

    def noted(config: DataConfig, rows: Any, *args: Any, **keys: Any) -> TokenizedData:
        found.append(Path(rows.place).name)
        return original(config, rows, *args, **keys)

    monkeypatch.setattr(loading, "_tokenize_rows", noted)
    return found


def load(folder: Path, tokenizer: Any = None, *, task: str = "causal_lm", **changes: Any) -> str:
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    train = {"path": str(folder / "train.jsonl")} | changes.pop("train", {})
    config = DataConfig(**{"train": train, "format": PAIRS, **changes})
    cache = TokenCache(folder / "cache", tokenizer_fingerprint(tokenizer))
    return load_samples(
        config, tokenizer, task=task, batch_size=2, seed=0, position_ids=True, offline=True, cache=cache
    )[0].fingerprint


def test_the_same_data_is_tokenized_once_and_anything_else_anew(tmp_path: Path, calls: list[str]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sentiment_rows(9))
    first = load(tmp_path)
    assert load(tmp_path) == first
    assert calls == ["train.jsonl"]

    other = byte_tokenizer()
    other.add_tokens(["very"])
    prints = [
        load(tmp_path, max_length=9),
        load(tmp_path, other),
        load(tmp_path, format=PAIRS | {"completion": "{label}"}),
        load(tmp_path, train={"limit": 8}),
        load(tmp_path, train={"split": "train[1:]"}),
        load(tmp_path, train={"columns": {"label": "sentence", "sentence": "sentence"}}),
        load(tmp_path, train={"format": PAIRS | {"prompt": "{label}"}}),
        load(tmp_path, format=WORDS),
        load(tmp_path, format=WORDS, task="sequence_classification"),
    ]
    assert len(calls) == 1 + len(prints)
    assert len({first, *prints}) == 1 + len(prints)

    times = (path.stat().st_atime, path.stat().st_mtime)
    path.write_text(path.read_text().replace("good", "fine", 1))
    os.utime(path, times)  # the same size and time
    assert load(tmp_path) != first
    assert len(calls) == 2 + len(prints)

    os.rename(path, tmp_path / "moved.jsonl")
    assert load(tmp_path, train={"path": str(tmp_path / "moved.jsonl")}) == load(
        tmp_path, train={"path": str(tmp_path / "moved.jsonl")}
    )
    assert len(calls) == 2 + len(prints)  # the same content under another name


def test_values_of_other_types_are_other_rows(tmp_path: Path, calls: list[str]) -> None:
    for value in (1, "1", 1.0, True):
        write_jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": value}])
        load(tmp_path)
    assert len(calls) == 4


def test_another_program_makes_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TokenCache(tmp_path, "tokenizer")
    cache.data({}, rich_data)
    monkeypatch.setattr(cache_module, "_program", lambda: "another")
    with pytest.raises(AssertionError, match="although"):
        cache.data({}, never)


def damage_byte(place: Path, *, name: str, at: float) -> None:
    content = bytearray((place / name).read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    (place / name).write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit of the header": lambda place: damage_byte(place, name="tokens.safetensors", at=0.1),
    "a bit of the tokens": lambda place: damage_byte(place, name="tokens.safetensors", at=1.0),
    "a bit of the hash": lambda place: damage_byte(place, name="entry.json", at=0.8),
    "a bit of the JSON": lambda place: damage_byte(place, name="entry.json", at=0.0),
    "cut": lambda place: os.truncate(place / "tokens.safetensors", 20),
    "empty": lambda place: os.truncate(place / "entry.json", 0),
    "no tokens": lambda place: (place / "tokens.safetensors").unlink(),
    "no hash": lambda place: (place / "entry.json").write_text("{}"),
    "a list": lambda place: (place / "entry.json").write_text("[]"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tokens_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    cache = TokenCache(tmp_path, "tokenizer")
    cache.data({}, rich_data)
    [place] = (tmp_path / "tokens").iterdir()
    DAMAGES[name](place)
    assert cache.data({}, rich_data) == rich_data()
    assert f"tokens: {place} is damaged (" in caplog.text
    assert cache.data({}, never) == rich_data()


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokens").write_text("a file in the way")
    assert TokenCache(tmp_path, "tokenizer").data({}, rich_data) == rich_data()
    assert "tokens: not cached, " in caplog.text


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    assert TokenCache(tmp_path, "tokenizer").data({}, rich_data) == rich_data()
    assert list((tmp_path / "tokens").iterdir()) == []


def test_several_writers_leave_one_whole_entry(tmp_path: Path) -> None:
    def make(_: int) -> TokenizedData:
        return TokenCache(tmp_path, "tokenizer").data({}, rich_data)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(16))) == [rich_data()] * 16
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert TokenCache(tmp_path, "tokenizer").data({}, never) == rich_data()


def test_what_was_used_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_ENTRIES", 3)
    cache = TokenCache(tmp_path, "tokenizer")
    for number in range(3):
        cache.data({"number": number}, rich_data)
        for entry in (tmp_path / "tokens").iterdir():  # the file system's clock may be coarse
            os.utime(entry, (0, entry.stat().st_mtime - 10))
    cache.data({"number": 0}, never)  # now the newest
    cache.data({"number": 3}, rich_data)
    for number in (0, 2, 3):
        cache.data({"number": number}, never)
    with pytest.raises(AssertionError, match="although"):
        cache.data({"number": 1}, never)


def test_large_entries_leave_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_BYTES", 1)
    cache = TokenCache(tmp_path, "tokenizer")
    for number in range(3):
        cache.data({"number": number}, rich_data)
        cache.data({"number": number}, never)  # the one that was just written stays
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_the_key_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vamo_ft")
    cache = TokenCache(tmp_path, "tokenizer")
    cache.data({}, rich_data)
    cache.data({}, never)
    [place] = (tmp_path / "tokens").iterdir()
    assert caplog.messages == [
        f"tokens: cached as {place.name[:12]}, 3 samples",
        f"tokens: from cache {place.name[:12]}, 3 samples",
    ]
    assert json.loads((place / "entry.json").read_text())["samples"] == 3


def test_a_stop_is_heard_while_rows_are_hashed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sentiment_rows(9))
    config = DataConfig(train={"path": str(tmp_path / "train.jsonl")}, format=PAIRS)
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) == 9 + 4  # the rows are read first

    with pytest.raises(StopRequested, match="preparation of the data"):
        load_samples(
            config,
            byte_tokenizer(),
            task="causal_lm",
            batch_size=2,
            seed=0,
            position_ids=True,
            offline=True,
            cache=TokenCache(tmp_path, "tokenizer"),
            stop_requested=stop,
        )
    assert len(asked) == 13


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VAMO_FT_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("VAMO_FT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "vamo-ft"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "vamo-ft"
