"""Keeps tokenized data sets between runs: safetensors and JSON, found by what they were made of."""

import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from hashlib import sha256
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vamo_ft.core.errors import first_line
from vamo_ft.data.examples import TokenizedData

__all__ = ["TokenCache", "cache_folder"]

_log = logging.getLogger("vamo_ft")

_MOST_ENTRIES = 64
_MOST_BYTES = 20 * 2**30
_TOKENS, _ENTRY = "tokens.safetensors", "entry.json"
_SHOWN = 12  # characters of a key in the log
_DTYPES = {"i": torch.int32, "q": torch.int64}


def cache_folder() -> Path:
    """`$VAMO_FT_CACHE`, else `vamo-ft` in `$XDG_CACHE_HOME`, else `~/.cache/vamo-ft`."""
    if own := os.environ.get("VAMO_FT_CACHE"):
        return Path(expanduser(own))
    return Path(expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "vamo-ft"


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Tokenized data sets under `tokens/<key>/` of a folder.

    An entry is written aside and renamed, so that it is there whole or not at all, for any number of processes. Its
    file is hashed when it is read; a damaged one is made again. The entries that were used last are kept, at most 64
    and 20 GiB of them. What fails on the disk costs a line in the log, and never the run.

    Attributes:
        folder: as `cache_folder` tells it.
        tokenizer: fingerprint of the tokenizer.
    """

    folder: Path
    tokenizer: str

    def data(self, made_of: Mapping[str, Any], tokenize: Callable[[], TokenizedData]) -> TokenizedData:
        """The tokenized data from the cache, or else from `tokenize`, and then kept.

        Args:
            made_of: what decides the result beside the tokenizer and this program's code; becomes JSON.
        """
        text = json.dumps([made_of, self.tokenizer, _program()], sort_keys=True)
        key = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        place = self.folder / "tokens" / key
        try:
            found = _read(place)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.warning("tokens: %s is damaged (%s); they are made again", place, first_line(error))
            shutil.rmtree(place, ignore_errors=True)
            found = None
        if found is not None:
            _log.info("tokens: from cache %s, %d samples", key[:_SHOWN], len(found))
            return found
        made = tokenize()
        try:
            _write(place, made)
            _prune(place.parent, kept=key)
        except OSError as error:
            _log.warning("tokens: not cached, %s cannot be written (%s)", place, error.strerror or error)
        else:
            _log.info("tokens: cached as %s, %d samples", key[:_SHOWN], len(made))
        return made


@cache
def _program() -> str:
    """SHA-256 of the code that makes tokens: its files, and the versions of the libraries it calls."""
    digest = sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    for library in ("transformers", "tokenizers"):
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    return digest.hexdigest()


def _read(place: Path) -> TokenizedData | None:
    """The data of an entry; None where there is none.

    Raises:
        ValueError: it is not what was written; so do the other errors of files that are damaged.
    """
    if not place.is_dir():
        return None
    path = place / _TOKENS
    if json.loads((place / _ENTRY).read_bytes())["sha256"] != _file_hash(path):
        raise ValueError("its hash is another one")
    with safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()["rest"])
        values: dict[str, Any] = {
            name: _array(file.get_tensor(name), code) for name, code in rest.pop("arrays").items()
        }
    os.utime(place)  # it was used last
    return TokenizedData(**values, **{name: _plain(value) for name, value in rest.items()})


def _write(place: Path, data: TokenizedData) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    flat = {name: value for name, value in values.items() if isinstance(value, array)}
    rest = {name: _jsonable(value) for name, value in values.items() if name not in flat}
    rest["arrays"] = {name: value.typecode for name, value in flat.items()}
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
    try:
        tensors = {name: _tensor(value) for name, value in flat.items()}
        path = aside / _TOKENS
        try:
            save_file(tensors, path, metadata={"rest": json.dumps(rest)})
        except SafetensorError as error:  # how the library tells of a full disk
            raise OSError(str(error)) from error
        (aside / _ENTRY).write_text(json.dumps({"samples": len(data), "sha256": _file_hash(path)}), encoding="utf-8")
        try:
            aside.rename(place)
        except OSError:
            if not place.is_dir():  # another process was faster, with the same
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _prune(folder: Path, *, kept: str) -> None:
    """Removes what was used least recently, beyond the limits; and what a process left that ended while writing."""
    used: list[tuple[float, int, Path]] = []
    for entry in folder.iterdir():
        try:
            size = sum(file.stat().st_size for file in entry.iterdir())
            used.append((entry.stat().st_mtime, size, entry))
        except OSError:  # another process removes it
            continue
    total = 0
    for number, (_, size, entry) in enumerate(sorted(used, reverse=True), start=1):
        total += size
        if (number > _MOST_ENTRIES or total > _MOST_BYTES) and entry.name != kept:
            shutil.rmtree(entry, ignore_errors=True)


def _file_hash(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _tensor(values: "array[int]") -> Tensor:
    dtype = _DTYPES[values.typecode]
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def _array(tensor: Tensor, code: str) -> "array[int]":
    values = array(code)
    values.frombytes(tensor.numpy().tobytes())
    return values


def _jsonable(value: Any) -> Any:
    """Mappings with numbers as keys as lists of pairs, marked as such."""
    if isinstance(value, Mapping):
        return {"pairs": [[key, _jsonable(inner)] for key, inner in value.items()]}
    return [_jsonable(inner) for inner in value] if isinstance(value, tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value["pairs"]}
    return tuple(map(_plain, value)) if isinstance(value, list) else value
