"""The optimizer's forms and precisions, and what they do not go with."""

import pytest

from tests.config.examples import VALID, load_text, problems_of

MEZO = VALID.replace("name: vamo", "name: mezo").replace("  name: adamw\n", "")
LOW = "model.dtype=bfloat16"
MASTERS = "optimizer.master_weights=true"
LORA = "model.adapter={type: lora}"


@pytest.mark.parametrize("text", [VALID, MEZO, MEZO.replace("mezo", "mezo_bcd")])
def test_master_weights_are_of_bfloat16_weights(text: str) -> None:
    assert load_text(text, LOW, MASTERS).config.optimizer.master_weights
    assert not load_text(text, LOW).config.optimizer.master_weights
    assert load_text(text, LOW, MASTERS, "model.adapter={type: lora, modules_to_save: [lm_head]}")


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        (
            VALID,
            [],
            "optimizer.master_weights: the weights are float32 themselves; leave it out, or write model.dtype: "
            "bfloat16",
        ),
        (VALID, [LOW, LORA], "optimizer.master_weights: adapters are float32 themselves; leave it out"),
        (
            MEZO.replace("mezo", "sparse_mezo"),
            [LOW],
            "optimizer.master_weights: method.directions.structure: sparse takes the smaller of the bfloat16 weights, "
            "which are not quite the smaller of the float32 ones; leave it out",
        ),
    ],
)
def test_master_weights_that_would_mean_nothing(text: str, overrides: list[str], problem: str) -> None:
    assert problems_of(text, *overrides, MASTERS) == [f"--set {problem}"]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_forms_of_adamw_are_adamw(name: str) -> None:
    for method in ("vamo", "adamw", "first_order"):
        text = VALID.replace("name: vamo", f"name: {method}")
        config = load_text(text, f"optimizer.name={name}", "optimizer.betas=[0.9, 0.95]", "optimizer.eps=1e-6").config
        assert config.optimizer.betas == (0.9, 0.95)
    text = VALID.replace("name: vamo", "name: sgd")
    assert problems_of(text, f"optimizer.name={name}") == [
        f"--set optimizer.name: {name} contradicts method.name: sgd; leave it out, or write method.name: first_order"
    ]
    assert problems_of(VALID, f"optimizer.name={name}", "optimizer.momentum=0.9") == [
        f"--set optimizer.momentum: {name} has no such setting (sgd only)"
    ]


def test_a_name_that_other_programs_shorten_is_suggested() -> None:
    (problem,) = problems_of(VALID, "optimizer.name=paged_adamw")
    assert problem.endswith(
        "'adamw_8bit', 'paged_adamw_8bit' or 'paged_adamw_32bit', not 'paged_adamw'. Did you mean 'paged_adamw_8bit'?"
    )


INFORMED = "method.directions={structure: gradient_subspace}"
OFFLOAD = "method.snapshot.offload=true"


def test_offload_is_for_what_is_large() -> None:
    assert problems_of(VALID, OFFLOAD) == [
        "--set method.snapshot.offload: a table of derivatives is small, and nothing of the parameters' size is kept; "
        "leave it out (it is for source: recompute and directions.structure: gradient_subspace)"
    ]
    for overrides in ([INFORMED], ["method.source=recompute"]):
        assert load_text(VALID, OFFLOAD, *overrides).config.method.snapshot.offload
    for name in ("svrg", "zo_svrg", "vamo_literal"):
        radius = ["method.radius=0.5"] if name == "vamo_literal" else []
        assert load_text(VALID.replace("name: vamo", f"name: {name}"), OFFLOAD, *radius)
