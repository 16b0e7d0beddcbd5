"""What tells one base model and tokenizer from another, without reading gigabytes."""

import hashlib
import json
from os.path import expanduser, isfile
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vamo_ft.config.model import ModelConfig
from vamo_ft.models.export import quietly

__all__ = ["base_fingerprint", "tokenizer_fingerprint"]

_SAMPLES = 16
_SAMPLE_BYTES = 64 * 1024


def base_fingerprint(config: ModelConfig) -> dict[str, Any] | None:
    """Hashes of the model that `model.path` names, if it is on this machine; never asks the network.

    Returns:
        `path` as written; `commit` of a Hub model, else None; SHA-256 of `config` (config.json) and of `weights`: name
        and size of each safetensors file, its header, and 16 samples of 64 KiB spread evenly over it, so that a small
        file is hashed whole and a large one costs 1 MiB; SHA-256 of `tokenizer`, see `tokenizer_fingerprint`. A
        `.gguf` file holds all three and is sampled as one. None where the model is not here.
    """
    folder, commit = _folder(config)
    if folder is None:
        return None
    facts: dict[str, Any] = {"path": config.path, "commit": commit}
    if folder.is_file():
        return {**facts, "config": None, "weights": _digest([folder]), "tokenizer": None}
    files = sorted(folder.glob("*.safetensors"))
    if not files:  # a cache may hold the configuration alone
        return None
    return {
        **facts,
        "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "weights": _digest(files),
        "tokenizer": _tokenizer_of(folder, config),
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the serialised tokenizer: the backend's JSON (or the vocabulary), special tokens and chat template.

    Padding and truncation are left out: the backend's JSON shows those of the last call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        tokenizer.get_vocab() if backend is None else {**json.loads(backend.to_str()), "padding": 0, "truncation": 0}
    )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = json.dumps([rules, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _tokenizer_of(folder: Path, config: ModelConfig) -> str | None:
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=config.trust_remote_code
            )
    except Exception:  # whatever a damaged tokenizer makes the library raise: it is not the one that was there
        return None
    return tokenizer_fingerprint(tokenizer)


def _folder(config: ModelConfig) -> tuple[Path | None, str | None]:
    """Where the model lies, and the commit of one from the Hub."""
    local = Path(expanduser(config.path))
    if isfile(local / "config.json") or (local.suffix == ".gguf" and isfile(local)):  # unlike Path's, never raise
        return local, None
    try:
        cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    except HFValidationError:
        return None, None
    if not isinstance(cached, str):
        return None, None
    return Path(cached).parent, Path(cached).parent.name


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(length, size)))
            last = max(0, size - _SAMPLE_BYTES)
            for place in sorted({last * index // (_SAMPLES - 1) for index in range(_SAMPLES)}):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
