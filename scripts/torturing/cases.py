"""The runs that are attacked: a tiny model, sixty sentences, and a configuration for each kind of training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["CASES", "NUM_STEPS", "prepare", "run_directory"]

NUM_STEPS = 90

CASES: Mapping[str, Mapping[str, Any]] = {
    "sgd_momentum_dropout": {
        "model": {"adapter": {"type": "lora", "r": 2, "alpha": 4, "target_modules": ["q_proj"], "dropout": 0.2}},
        "method": {"name": "sgd"},
        "optimizer": {"learning_rate": 1.0, "momentum": 0.9},
        "schedule": {"name": "cosine", "warmup_steps": 5},
    },
    "vamo": {
        "method": {"name": "vamo", "probes": 4, "eps": 0.001, "snapshot": {"every": "7 steps"}},
        "optimizer": {"learning_rate": 0.01},
    },
    "mezo": {"method": {"name": "mezo"}, "optimizer": {"learning_rate": 1e-4}},
    "mezo_bcd": {"method": {"name": "mezo_bcd"}, "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1}},
    "adamw_accumulation": {
        "method": {"name": "adamw"},
        "optimizer": {"learning_rate": 0.003},
        "training": {"micro_batch_size": 4},
    },
}
"""Name -> what its configuration has of its own. Several periods, so that what is due never falls together for long."""


def prepare(root: Path) -> None:
    """Writes the model, the data and `<case>.yaml` for every case."""
    from tests.tiny import save_model_folder, sentiment_rows, tiny_llama, write_jsonl  # torch, only where it is needed
    from vamo_ft.models.export import quietly

    with quietly():
        save_model_folder(root / "model", tiny_llama(dropout=0.1))
    write_jsonl(root / "train.jsonl", sentiment_rows(60))
    write_jsonl(root / "eval.jsonl", sentiment_rows(40))
    for name, own in CASES.items():
        text = yaml.safe_dump(_configuration(root, own), sort_keys=False)
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")


def run_directory(folder: Path) -> Path:
    """Where a process with the working directory `folder` writes its run."""
    return folder / "runs" / "run"


def _configuration(root: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": {"name": "run", "output_dir": "runs", "seed": 3, "offline": True},
        "data": {
            "train": {"path": str(root / "train.jsonl")},
            "evaluation": {"path": str(root / "eval.jsonl")},
            "format": {"type": "classification", "template": "{sentence} It was", "labels": {0: " bad", 1: " fine"}},
            "max_length": 48,
        },
        "evaluation": {"every": "9 steps", "metrics": ["loss", "accuracy"]},
        "checkpoint": {"every": "10 steps", "keep": 2},
        "logging": {"every": "2 steps"},
        **own,
        "model": {"path": str(root / "model"), **own.get("model", {})},
        "training": {
            "steps": NUM_STEPS,
            "batch_size": 6,
            "forward_batch_tokens": 300,  # snapshots and evaluations of many passes
            **own.get("training", {}),
        },
    }
