"""Structures of directions, and the methods that stand for one."""

import pytest

from tests.config.examples import VALID, load_text, problems_of
from vamo_ft.config.method import OPTIMIZERS

SPSA = VALID.replace("name: vamo", "name: spsa").replace("name: adamw", "name: sgd")


@pytest.mark.parametrize(
    ("directions", "order", "rank", "refresh_every", "quantile"),
    [
        ("{}", None, None, None, None),
        ("{structure: block}", "random_permutation", None, None, None),
        ("{structure: block, order: flip_flop}", "flip_flop", None, None, None),
        ("{structure: low_rank}", None, 2, 50, None),
        ("{structure: subspace}", None, 24, 1000, None),
        ("{structure: subspace, rank: 3, refresh_every: null}", None, 3, 1000, None),
        ("{structure: sparse}", None, None, None, 0.25),
    ],
)
def test_each_structure_has_defaults_of_its_own(directions, order, rank, refresh_every, quantile) -> None:
    config = load_text(SPSA, f"method.directions={directions}").config.method.directions
    assert (config.order, config.rank, config.refresh_every, config.quantile) == (order, rank, refresh_every, quantile)


def test_a_default_of_the_structure_counts_as_a_default() -> None:
    sources = load_text(SPSA, "method.directions.structure=low_rank").sources
    assert sources["method.directions.rank"] == "default"
    assert sources["method.directions.structure"] == "--set"


@pytest.mark.parametrize(
    ("directions", "problem"),
    [
        ("{rank: 2}", "rank: full has no such setting (low_rank and subspace only)"),
        ("{structure: block, rank: 2}", "rank: block has no such setting (low_rank and subspace only)"),
        ("{structure: sparse, order: cyclic}", "order: sparse has no such setting (block only)"),
        ("{structure: low_rank, quantile: 0.5}", "quantile: low_rank has no such setting (sparse only)"),
        ("{structure: block, refresh_every: 9}", "refresh_every: block has no such setting (low_rank and subspace "),
        ("{structure: low_rank, rank: 0}", "rank: must be at least 1, not 0"),
        ("{structure: sparse, quantile: 1}", "quantile: must be below 1, not 1"),
        ("{structure: [full]}", "structure: must be 'full', 'block', 'low_rank', 'subspace', 'sparse' or "),
        (
            "{structure: block, distribution: sphere}",
            "distribution: sphere fixes the norm of the whole direction, and goes with structure: full; write gaussian "
            "for block",
        ),
        ("{warmup_steps: 9}", "warmup_steps: full has no such setting (gradient_subspace only)"),
        (
            "{structure: gradient_subspace, distribution: gaussian}",
            "distribution: gradient_subspace reads its directions from gradients; leave it out",
        ),
    ],
)
def test_a_key_belongs_to_its_structure(directions: str, problem: str) -> None:
    (found,) = problems_of(SPSA, f"method.directions={directions}")
    assert found.startswith(f"--set method.directions.{problem}")


def test_an_estimator_takes_the_structures_of_the_table() -> None:
    (found,) = problems_of(VALID, "method.directions.structure=block")
    assert found.startswith(
        "--set method.directions.structure: vamo takes full or gradient_subspace, not block; leave it out, or write "
        "name: spsa"
    )


@pytest.mark.parametrize(
    ("method", "structure"),
    [("mezo_bcd", "block"), ("lozo", "low_rank"), ("subzero", "subspace"), ("sparse_mezo", "sparse"), ("mezo", "full")],
)
def test_a_name_stands_for_gaussian_directions_of_a_structure(method: str, structure: str) -> None:
    config = load_text(SPSA, f"method.name={method}").config
    assert (config.method.directions.structure, config.method.directions.distribution) == (structure, "gaussian")
    assert config.training.max_grad_norm is None
    if method != "mezo":
        assert problems_of(SPSA, f"method.name={method}", "method.directions.structure=full") == [
            f"--set method.directions.structure: full contradicts name: {method}; leave it out, or write name: mezo"
        ]


@pytest.mark.parametrize(
    ("method", "optimizer"), [("zo_adam", "adamw"), ("zo_sign", "sign_sgd"), ("zo_momentum", "sgd")]
)
def test_a_name_stands_for_an_optimizer(method: str, optimizer: str) -> None:
    text = SPSA.replace("name: spsa", f"name: {method}").replace("  name: sgd\n", "")
    config = load_text(text, "model.adapter.type=lora").config
    assert config.optimizer.name == optimizer == OPTIMIZERS[method]
    assert config.optimizer.momentum == (0.9 if method == "zo_momentum" else 0)
    assert config.method.directions.distribution == "gaussian"
    assert config.method.eps == 1e-2
    assert problems_of(text, "optimizer.name=adagrad") == [
        f"--set optimizer.name: adagrad contradicts method.name: {method}; leave it out, or write method.name: mezo"
    ]


def test_momentum_of_zero_is_not_zo_momentum() -> None:
    assert problems_of(SPSA, "method.name=zo_momentum", "optimizer.momentum=0.0") == [
        "--set optimizer.momentum: 0 contradicts method.name: zo_momentum; leave it out, or write method.name: mezo"
    ]


def test_sparse_directions_need_weights_that_differ() -> None:
    text = SPSA.replace("  name: sgd\n", "")
    (found,) = problems_of(SPSA, "method.name=sparse_mezo", "model.adapter.type=lora")
    forward = "method={name: forward_gradient, directions: {structure: sparse}}"
    assert problems_of(text, forward, "model.adapter.type=lora") == [found.replace("config.yaml:9: ", "--set ")]
    assert "method.directions.structure: sparse takes the smaller weights of each tensor, and half of an" in found


INFORMED = "method.directions.structure=gradient_subspace"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["method.radius=0.1"], "radius: directions.structure: full has no such setting; write eps"),
        ([INFORMED, "method.eps=1e-3"], "eps: gradient_subspace has directions of norm 1; write radius"),
        (
            [INFORMED, "method.probes=8", "method.directions.warmup_steps=8"],
            "directions.warmup_steps: 8 gradients do not give 8 directions; it must be above probes",
        ),
        (
            ["method.snapshot.budget=2.0"],
            "budget: periodic refresh has no such setting; leave it out, or write refresh: adaptive",
        ),
        (
            ["method.snapshot={every: 4 steps, set: {subset: 512}, refresh: adaptive}"],
            "snapshot.refresh: adaptive may keep a snapshot past the steps whose samples it scored",
        ),
        (["method.alpha=often"], "alpha: must be"),
        (["method.alpha=-1.0"], "alpha: must be"),
    ],
)
def test_what_a_corrected_gradient_cannot_have(overrides: list[str], problem: str) -> None:
    found = problems_of(VALID, *overrides)
    assert any(problem in each for each in found), found


def test_informed_directions_have_a_warm_up_and_a_radius() -> None:
    method = load_text(VALID, INFORMED, "method.radius=0.05").config.method
    assert (method.directions.warmup_steps, method.radius, method.alpha) == (32, 0.05, "adaptive")
    adaptive = load_text(VALID, "method.snapshot={refresh: adaptive, budget: 0.5}").config.method.snapshot
    assert (adaptive.min_correlation, adaptive.budget) == (0.3, 0.5)
