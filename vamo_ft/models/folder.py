"""What a folder has to hold before a library opens it: messages that name the file, and no other kind of weights."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from vamo_ft.core.errors import DataError

__all__ = ["check_adapter_folder", "check_model_folder", "check_tokenizer", "first_words"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def check_model_folder(directory: Path) -> None:
    """Refuses a folder that is not a whole model with safetensors weights; weights that may run code stay unopened.

    Raises:
        DataError: a file is missing, unreadable, damaged or of another kind; names it.
    """
    try:
        if (directory / "adapter_config.json").exists():
            raise DataError(f"{directory}: holds an adapter, not a whole model; write its base model as model.path")
        if not (directory / "config.json").is_file():
            raise DataError(f"{directory}: is not a model folder: it has no config.json")
        _read_object(directory / "config.json")
        _check_optional(directory)
        for name in _weight_files(directory):
            _check_weights(directory, name)
    except OSError as error:
        raise _unreadable(error, directory) from error


def check_adapter_folder(directory: Path) -> None:
    """Refuses a folder that is not an adapter with safetensors weights.

    Raises:
        DataError: a file is missing, unreadable or damaged; names it.
    """
    try:
        for path in (directory / "adapter_config.json", directory / "adapter_model.safetensors"):
            if not path.is_file():
                raise DataError(f"{directory}: has no {path.name}; this is not an adapter that was saved here")
        _read_object(directory / "adapter_config.json")
        _check_optional(directory)
        _check_weights(directory, "adapter_model.safetensors")
    except OSError as error:
        raise _unreadable(error, directory) from error


def check_tokenizer(directory: Path) -> None:
    """Finds out why a tokenizer could not be loaded; beforehand it would cost reading tens of MB twice.

    Raises:
        DataError: there is no `tokenizer.json`, or it cannot be read.
    """
    path = directory / "tokenizer.json"
    try:
        if path.exists():
            _read_object(path)
            return
    except OSError as error:
        raise _unreadable(error, directory) from error
    raise DataError(
        f"{directory}: has no tokenizer.json, and no other tokenizer that can be loaded; put the files of the model's "
        "tokenizer there"
    )


def first_words(error: BaseException) -> str:
    """A library's message on one line: its first line, and the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return (
        text
        if text and isinstance(error, OSError | ValueError | ImportError)
        else ": ".join(filter(None, (type(error).__name__, text)))
    )


def _unreadable(error: OSError, directory: Path) -> DataError:
    return DataError(f"{error.filename or directory}: cannot be read ({error.strerror or error})")


def _check_optional(directory: Path) -> None:
    for name in _OPTIONAL:
        if (directory / name).exists():
            _read_object(directory / name)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); put the model's own file back") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); put the model's own file back"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); put the model's own file back") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; put the model's own file back")
    return value


def _weight_files(directory: Path) -> list[str]:
    index = directory / _INDEX
    if not index.is_file():
        return [_WEIGHTS]
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{index}: is damaged: weight_map does not name a file for each tensor")
    files = sorted(set(names.values()))
    for name in files:
        if not name.endswith(".safetensors"):
            raise DataError(f"{index}: names {name}, which is not a safetensors file; nothing else is opened")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{index}: names {name}, which lies outside of the folder")
    return files


def _check_weights(directory: Path, name: str) -> None:
    path = directory / name
    if not path.is_file():
        raise DataError(f"{directory}: has no {name}; weights in other formats, such as pickled .bin, are not opened")
    with path.open("rb"):  # safetensors calls a file that may not be read missing
        pass
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise DataError(f"{path}: is not an intact safetensors file ({error}); copy or download it again") from error
