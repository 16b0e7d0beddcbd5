"""Which runs can share their model out over processes (`training.fsdp`)."""

from typing import TYPE_CHECKING

from vamo_ft.config.method import FirstOrderConfig, SpsaConfig, VamoConfig
from vamo_ft.config.optimizer import BITSANDBYTES

if TYPE_CHECKING:
    from vamo_ft.config.schema import RunConfig

__all__ = ["why_not_shared"]


def why_not_shared(config: "RunConfig") -> str | None:
    """What would need whole tensors in every process, and what to write instead; None: nothing does."""
    method = config.method
    if not isinstance(method, FirstOrderConfig | SpsaConfig | VamoConfig):
        return (
            f"method.name: {method.name} needs whole tensors in every process; leave it out, or write adamw, mezo, "
            "vamo or one of their kind"
        )
    if method.structure in ("low_rank", "subspace", "sparse"):
        return (
            f"method.directions.structure: {method.structure} needs whole tensors in every process; leave "
            "training.fsdp out, or write full or block"
        )
    for key, present in (
        ("model.compile", config.model.compile),
        ("model.quantization", config.model.quantization is not None),
        ("training.stream_layers", config.training.stream_layers),
        (f"optimizer.name: {config.optimizer.name}", config.optimizer.name in BITSANDBYTES),
    ):
        if present:
            return f"{key} does not go with it; leave one of them out"
    if config.objective.type == "metric":
        return "objective.type: metric does not go with it; write loss, or leave fsdp out"
    return None
