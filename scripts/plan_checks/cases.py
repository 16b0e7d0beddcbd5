"""The configurations that are planned and run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vamo_ft.config.load import load_config
from vamo_ft.config.schema import RunConfig

__all__ = ["CASES", "Case", "case_config"]

_FILE = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
_COMMON = (
    "run.offline=true",
    "data.train.limit=64",
    "data.evaluation=null",
    "data.max_length=128",
    "evaluation.metrics=[loss]",
    "training.forward_batch_tokens=1024",
)
_FULL = "model.adapter=null"
_SHARED = "training.fsdp=true"
_FIRST_ORDER = "method={name: adamw}"
_ZEROTH_ORDER = ("optimizer={name: sgd, learning_rate: 1.0e-6}", _FULL)


@dataclass(frozen=True, slots=True)
class Case:
    """What differs from the quick start, and how many processes share the run out."""

    changes: tuple[str, ...] = ()
    processes: int = 1


CASES: Mapping[str, Case] = {
    "adamw, LoRA": Case((_FIRST_ORDER,)),
    "adamw, LoRA, activation checkpointing": Case((_FIRST_ORDER, "training.activation_checkpointing=true")),
    "adamw, all weights in float32": Case((_FIRST_ORDER, _FULL)),
    "adamw, all weights in bfloat16": Case((_FIRST_ORDER, _FULL, "model.dtype=bfloat16")),
    "adamw_8bit, all weights in bfloat16": Case(
        (_FIRST_ORDER, _FULL, "model.dtype=bfloat16", "optimizer.name=adamw_8bit")
    ),
    "adamw, LoRA on 4 bits": Case((_FIRST_ORDER, "model.dtype=bfloat16", "model.quantization={bits: 4}")),
    "vamo, LoRA": Case(),
    "vamo along gradients, LoRA": Case(
        (
            "method={name: vamo, probes: 4, difference: forward, radius: 0.02, "
            "directions: {structure: gradient_subspace, warmup_steps: 5}, snapshot: {every: 1 epoch}}",
        )
    ),
    "mezo, all weights in float32": Case(("method={name: mezo}", *_ZEROTH_ORDER)),
    "mezo_bcd, all weights in bfloat16": Case(("method={name: mezo_bcd}", *_ZEROTH_ORDER, "model.dtype=bfloat16")),
    "vamo, LoRA, 2 processes": Case(processes=2),
    "adamw, all weights in float32, 2 processes": Case((_FIRST_ORDER, _FULL), processes=2),
    "adamw, all weights in float32, fsdp of 2": Case((_FIRST_ORDER, _FULL, _SHARED), processes=2),
    "mezo, all weights in float32, fsdp of 2": Case(("method={name: mezo}", *_ZEROTH_ORDER, _SHARED), processes=2),
}
"""Name -> case."""


def case_config(name: str) -> RunConfig:
    """The configuration of a case."""
    return load_config(_FILE, overrides=[*_COMMON, *CASES[name].changes]).config
