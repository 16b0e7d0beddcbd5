"""Which runs can keep their layers in host memory (`training.stream_layers`)."""

from vamo_ft.config.method import MethodConfig, SpsaConfig
from vamo_ft.config.optimizer import OptimizerConfig

__all__ = ["why_not_streamed"]


def why_not_streamed(method: MethodConfig, optimizer: OptimizerConfig, *, quantized: bool) -> str | None:
    """What would have to hold all layers at once, and what to write instead; None: passes and updates take one each.

    Args:
        quantized: the model's weights are put on the device in 4 bits.
    """
    if not isinstance(method, SpsaConfig):
        return (
            f"method.name: {method.name} needs all layers at once, or copies of them; write false, or method.name: mezo"
        )
    if method.structure not in ("full", "block"):
        return (
            f"directions of structure: {method.structure} are not formed layer by layer; write false, or "
            "method.directions.structure: full or block"
        )
    if optimizer.master_weights:
        return "optimizer.master_weights are kept on the device, for all layers; leave one of the two out"
    if not optimizer.is_plain_sgd:
        rule = f"{optimizer.name} with momentum" if optimizer.momentum > 0 else optimizer.name
        return f"{rule} forms a gradient of all layers; write false, or optimizer.name: sgd without momentum"
    if quantized:
        return "model.quantization puts all layers on the device, in 4 bits; leave one of the two out"
    return None
