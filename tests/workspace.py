"""A folder with a tiny model, data and a configuration, and ways to run commands in it."""

import hashlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import save_model_folder, sentiment_rows, tiny_llama, write_jsonl
from vamo_ft.cli import run

TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes", "eval.seconds")
LORA = {"type": "lora", "r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}

VAMO = {"method": {"name": "vamo", "probes": 2, "eps": 0.001, "snapshot": {"every": "4 steps"}}}
PLAIN: dict[str, Any] = {
    "data": {"evaluation": None},
    "evaluation": {"every": None, "metrics": ["loss"]},
    "optimizer": {"learning_rate": 1e-3},
}
MEZO: dict[str, Any] = {**PLAIN, "method": {"name": "mezo"}}
ADAMW = {"optimizer": {"name": "adamw", "learning_rate": 0.01}}


def base_config() -> dict[str, Any]:
    return {
        "run": {"name": "tiny", "seed": 3},
        "model": {"path": "model"},
        "data": {
            "train": {"path": "train.jsonl"},
            "evaluation": {"path": "eval.jsonl"},
            "format": {
                "type": "classification",
                "template": "{sentence} It was",
                "labels": {0: " bad", 1: " fine"},
            },
            "max_length": 48,
        },
        "method": {"name": "adamw"},
        "optimizer": {"learning_rate": 0.01},
        "training": {"steps": 8, "batch_size": 6},
        "evaluation": {"every": "4 steps", "metrics": ["loss", "accuracy"]},
        "checkpoint": {"every": "3 steps"},
        "logging": {"every": "2 steps", "report": False},
    }


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def weights_in(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal_weights(first: Path, second: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    a, b = weights_in(first), weights_in(second)
    return a.keys() == b.keys() != set() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """Sends this process a SIGTERM at the given call of a method."""
    original, calls = getattr(owner, name), 0

    def wrapper(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(owner, name, wrapper)


def export(*arguments: str) -> int:
    return run(["export", *arguments])


class Workspace:
    """The folder; commands run in this process, with it as the working directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        save_model_folder(root / "model", tiny_llama())
        write_jsonl(root / "train.jsonl", sentiment_rows(20))
        write_jsonl(root / "eval.jsonl", sentiment_rows(9))

    def configure(self, changes: Mapping[str, Any] | None = None, *, file: str = "config.yaml") -> str:
        text = yaml.safe_dump(merged(base_config(), changes or {}), sort_keys=False)
        (self.root / file).write_text(text, encoding="utf-8")
        return file

    def train(self, *arguments: str, config: str = "config.yaml") -> int:
        return run(["train", config, *arguments])

    def directory(self, name: str = "tiny") -> Path:
        return self.root / "runs" / name

    def metrics(self, name: str = "tiny") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without what depends on the clock."""
        lines = (self.directory(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]

    def seed_log(self, name: str = "tiny") -> bytes | None:
        """The bytes of seedlog.bin, where there is one."""
        log = self.directory(name) / "seedlog.bin"
        return log.read_bytes() if log.exists() else None

    def weights(self, name: str = "tiny") -> str:
        """A hash of the final model's tensors."""
        digest = hashlib.sha256()
        for file in sorted((self.directory(name) / "model").glob("*.safetensors")):
            for key, tensor in sorted(load_file(file).items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {tensor.float().tolist()}".encode())
        return digest.hexdigest()
