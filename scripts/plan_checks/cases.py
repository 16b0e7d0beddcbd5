"""The configurations that are planned and run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vamo_ft.config.load import load_config
from vamo_ft.config.schema import RunConfig

__all__ = ["CASES", "case_config"]

_FILE = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
_COMMON = (
    "run.offline=true",
    "data.train.limit=64",
    "data.evaluation=null",
    "data.max_length=128",
    "evaluation.metrics=[loss]",
    "training.forward_batch_tokens=1024",
)
_FIRST_ORDER = "method={name: adamw}"
_ZEROTH_ORDER = ("optimizer={name: sgd, learning_rate: 1.0e-6}", "model.adapter=null")

CASES: Mapping[str, Sequence[str]] = {
    "adamw, LoRA": (_FIRST_ORDER,),
    "adamw, LoRA, activation checkpointing": (_FIRST_ORDER, "training.activation_checkpointing=true"),
    "adamw, all weights in float32": (_FIRST_ORDER, "model.adapter=null"),
    "adamw, all weights in bfloat16": (_FIRST_ORDER, "model.adapter=null", "model.dtype=bfloat16"),
    "adamw_8bit, all weights in bfloat16": (
        _FIRST_ORDER,
        "model.adapter=null",
        "model.dtype=bfloat16",
        "optimizer.name=adamw_8bit",
    ),
    "adamw, LoRA on 4 bits": (_FIRST_ORDER, "model.dtype=bfloat16", "model.quantization={bits: 4}"),
    "vamo, LoRA": (),
    "vamo along gradients, LoRA": (
        "method={name: vamo, probes: 4, difference: forward, radius: 0.02, "
        "directions: {structure: gradient_subspace, warmup_steps: 5}, snapshot: {every: 1 epoch}}",
    ),
    "mezo, all weights in float32": ("method={name: mezo}", *_ZEROTH_ORDER),
    "mezo_bcd, all weights in bfloat16": ("method={name: mezo_bcd}", *_ZEROTH_ORDER, "model.dtype=bfloat16"),
}
"""Name -> what differs from the quick start."""


def case_config(name: str) -> RunConfig:
    """The configuration of a case."""
    return load_config(_FILE, overrides=[*_COMMON, *CASES[name]]).config
