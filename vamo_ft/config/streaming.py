"""Which runs can keep their layers in host memory (`training.stream_layers`)."""

from vamo_ft.config.method import MethodConfig, SpsaConfig
from vamo_ft.config.optimizer import OptimizerConfig

__all__ = ["check_streaming"]


def check_streaming(method: MethodConfig, optimizer: OptimizerConfig, *, quantized: bool) -> None:
    """Forward passes and updates that go from layer to layer are streamed, and nothing else is.

    Args:
        quantized: the model's weights are put on the device in 4 bits.

    Raises:
        ValueError: something would have to hold all layers; names what.
    """
    if not isinstance(method, SpsaConfig):
        raise ValueError(
            f"training.stream_layers: method.name: {method.name} needs all layers at once, or copies of them; write "
            "false, or method.name: mezo"
        )
    if (structure := method.directions.structure) not in ("full", "block"):
        raise ValueError(
            f"training.stream_layers: directions of structure: {structure} are not formed layer by layer; write false, "
            "or method.directions.structure: full or block"
        )
    if optimizer.name != "sgd" or optimizer.momentum > 0:
        rule = f"{optimizer.name} with momentum" if optimizer.momentum > 0 else optimizer.name
        raise ValueError(
            f"training.stream_layers: {rule} forms a gradient of all layers; write false, or optimizer.name: sgd "
            "without momentum"
        )
    if quantized:
        raise ValueError(
            "training.stream_layers: model.quantization puts all layers on the device, in 4 bits; leave one of the two "
            "out"
        )
