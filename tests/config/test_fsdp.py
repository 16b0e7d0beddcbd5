"""What does not go with a model that processes share out, and what is said of it."""

import pytest

from tests.config.examples import VALID, problems_of

SHARED = VALID.replace("steps: 10", "steps: 10\n  fsdp: true")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "name: vamo",
            "name: svrg",
            "training.fsdp: method.name: svrg needs whole tensors in every process; leave it out, or write adamw, "
            "mezo, vamo or one of their kind",
        ),
        (
            "name: vamo",
            "name: lozo",
            "training.fsdp: method.directions.structure: low_rank needs whole tensors in every process; leave "
            "training.fsdp out, or write full or block",
        ),
        (
            "some/model",
            "some/model\n  compile: true",
            "training.fsdp: model.compile does not go with it; leave one of them out",
        ),
        (
            "some/model",
            "some/model\n  adapter: {type: lora}\n  quantization: {bits: 4}",
            "training.fsdp: model.quantization does not go with it; leave one of them out",
        ),
        (
            "fsdp: true",
            "fsdp: true\n  stream_layers: true",
            "training.fsdp: training.stream_layers does not go with it; leave one of them out",
        ),
        (
            "name: adamw",
            "name: adamw_8bit",
            "training.fsdp: optimizer.name: adamw_8bit does not go with it; leave one of them out",
        ),
        (
            "name: vamo",
            "name: mezo\nobjective: {type: metric, name: exact_match}",
            "training.fsdp: objective.type: metric does not go with it; write loss, or leave fsdp out",
        ),
        (
            "fsdp: true",
            "fsdp: true\n  micro_batch_size: auto",
            "training.micro_batch_size: auto lets each process find out what fits, and with fsdp none runs by itself; "
            "write a number, or leave fsdp out",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused(old: str, new: str, said: str) -> None:
    assert old in SHARED
    text = SHARED.replace(old, new, 1)
    if "name: svrg" in new or "mezo" in new or "lozo" in new:
        text = text.replace("  name: adamw\n", "")
    (problem,) = problems_of(text)
    assert problem.partition(": ")[2] == said
