"""What keeps its layers on the host, and what cannot."""

import pytest

from tests.config.examples import VALID, load_text, problems_of

PLAIN = VALID.replace("  name: adamw\n", "")
STREAMED = "training.stream_layers=true"


@pytest.mark.parametrize("settings", [("method.name=mezo",), ("method.name=mezo_bcd",), ("method.name=spsa",)])
@pytest.mark.parametrize("adapter", ["null", "{type: lora}"])
def test_what_goes_from_layer_to_layer_is_streamed(settings: tuple[str, ...], adapter: str) -> None:
    given = (*settings, "optimizer={name: sgd, learning_rate: 1}", f"model.adapter={adapter}")
    assert not load_text(PLAIN, *given).config.training.stream_layers
    assert load_text(PLAIN, *given, STREAMED).config.training.stream_layers


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ("method.name=vamo",),
            "method.name: vamo needs all layers at once, or copies of them; write false, or method.name: mezo",
        ),
        (
            ("method.name=zo_svrg",),
            "method.name: zo_svrg needs all layers at once, or copies of them; write false, or method.name: mezo",
        ),
        (
            ("method.name=lozo",),
            "directions of structure: low_rank are not formed layer by layer; write false, or "
            "method.directions.structure: full or block",
        ),
        (
            ("method.name=zo_adam",),
            "adamw forms a gradient of all layers; write false, or optimizer.name: sgd without momentum",
        ),
        (
            ("method.name=mezo", "optimizer={name: sgd, momentum: 0.9, learning_rate: 1}"),
            "sgd with momentum forms a gradient of all layers; write false, or optimizer.name: sgd without momentum",
        ),
        (
            ("method.name=mezo", "model.adapter={type: lora}", "model.quantization={bits: 4}"),
            "model.quantization puts all layers on the device, in 4 bits; leave one of the two out",
        ),
    ],
)
def test_what_holds_all_layers_is_refused(settings: tuple[str, ...], problem: str) -> None:
    assert problems_of(PLAIN, *settings) == []
    assert problems_of(PLAIN, *settings, STREAMED) == [f"--set training.stream_layers: {problem}"]
