"""Keys of addax, forward_gradient and vamo_literal."""

import pytest

from tests.config.examples import VALID, load_text, problems_of

BARE = VALID.replace("name: vamo", "name: METHOD").replace("  name: adamw\n", "")
ADDAX = BARE.replace("METHOD", "addax\n  boundary: 64")
LITERAL = BARE.replace("METHOD", "vamo_literal\n  radius: 0.5")
FORWARD = BARE.replace("METHOD", "forward_gradient")


def test_presets() -> None:
    addax, literal, forward = (load_text(text).config for text in (ADDAX, LITERAL, FORWARD))
    assert {config.optimizer.name for config in (addax, literal, forward)} == {"sgd"}
    assert (addax.method.directions.distribution, addax.method.eps) == ("gaussian", 1e-3)
    assert load_text(ADDAX, "model.adapter.type=lora").config.method.eps == 1e-2
    assert forward.model.attn_implementation == "eager"
    assert [config.training.max_grad_norm for config in (addax, literal, forward)] == [None, 1.0, None]
    assert literal.method.alpha == "theory"
    assert load_text(LITERAL, "method.alpha=0.25").config.method.alpha == 0.25


@pytest.mark.parametrize(
    ("text", "override", "problem"),
    [
        (ADDAX, "method.boundary=0", "method.boundary: must be above 0, not 0"),
        (ADDAX, "method.weight=1.0", "method.weight: must be below 1, not 1.0"),
        (ADDAX, "method.weight=0.0", "method.weight: must be above 0, not 0.0"),
        (
            ADDAX,
            "method.directions.structure=sparse",
            "method.directions.structure: addax takes full or block or low_rank or subspace, not sparse; leave it out, "
            "or write name: spsa or forward_gradient",
        ),
        (
            LITERAL,
            "method.snapshot={set: {subset: 999}, every: 1 step}",
            "method.snapshot.set: vamo_literal takes all samples; leave it out, or write name: vamo",
        ),
        (LITERAL, "method.alpha=adaptive", "method.alpha: must be 'theory' or a number, not 'adaptive'"),
        (LITERAL, "method.eps=0.1", "method.eps: unknown key"),
        (FORWARD, "method.eps=0.1", "method.eps: unknown key"),
        (
            FORWARD,
            "model.compile=true",
            "model.compile: method.name: forward_gradient takes forward derivatives, which compiled code has none of; "
            "leave it out",
        ),
        *(
            (
                FORWARD,
                f"model.attn_implementation={kind}",
                f"model.attn_implementation: {kind} has no forward derivative, which method.name: forward_gradient "
                "needs; leave it out, or write eager",
            )
            for kind in ("sdpa", "flash_attention_2", "null")
        ),
        (
            FORWARD.replace("prompt_completion", 'classification\n    template: "{x}"\n    labels: {0: a, 1: b}'),
            "objective={type: metric, name: accuracy}",
            "objective.type: metric has no gradient, which method.name: forward_gradient needs; write method.name: "
            "mezo, or objective.type: loss",
        ),
    ],
)
def test_what_is_refused(text: str, override: str, problem: str) -> None:
    [found] = problems_of(text, override)
    assert found.removeprefix("--set ").startswith(problem)


@pytest.mark.parametrize(("text", "key"), [(ADDAX, "boundary"), (LITERAL, "radius")])
def test_what_has_no_default(text: str, key: str) -> None:
    lines = [line for line in text.splitlines() if f"  {key}: " not in line]
    [found] = problems_of("\n".join(lines))
    assert f"method.{key}: required" in found


def test_the_rule_of_a_method_that_is_not_known_is_not_asked_for() -> None:
    (problem,) = problems_of(BARE.replace("METHOD", "adax"))
    assert problem.endswith("not 'adax'. Did you mean 'addax'?")
