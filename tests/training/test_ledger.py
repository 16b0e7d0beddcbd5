"""Prices against what torch counts: the products with weight matrices, attention left out."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import pair, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_llama_classifier
from tests.toys import NetworkObjective, TinyNetwork, ToySource, normal
from vamo_ft.config.model import ModelConfig
from vamo_ft.core.blocks import BlockDirections, block_at, model_blocks
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Objective
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.types import Batch, Work
from vamo_ft.data.collation import collate_for_classifier, collate_for_language_model
from vamo_ft.data.examples import Example
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.models.adapters import add_adapter, freeze
from vamo_ft.models.export import quietly
from vamo_ft.models.loading import checkpoint_activations
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import SequenceClassification
from vamo_ft.training.ledger import Ledger
from vamo_ft.training.matrices import matrix_products

RUNTIME = LocalRuntime()
BLOCKS = ("embed_tokens", "layers.0", "layers.1", "norm", "lm_head")


def examples(samples: int) -> list[Example]:
    """9 tokens of prompt and 3 of completion, so that nothing is padded."""
    ids = torch.randint(3, 200, (samples, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [pair(index, tuple(row[:9]), tuple(row[9:]), index % 2) for index, row in enumerate(ids)]


def language(samples: int) -> Batch:
    return collate_for_language_model(examples(samples), pad_token_id=0, position_ids=True)


def classes(samples: int) -> Batch:
    return collate_for_classifier(examples(samples), pad_token_id=0, token_type_ids=False)


def with_lora(model: nn.Module, targets: Sequence[str] | str, *, in_full: Sequence[str] = ()) -> nn.Module:
    adapter = {"type": "lora", "r": 4, "dropout": 0.1, "target_modules": targets, "modules_to_save": list(in_full)}
    with quietly():
        return add_adapter(model, ModelConfig(path="org/name", adapter=adapter))


def with_frozen(model: nn.Module, *patterns: str) -> nn.Module:
    freeze(model, patterns)
    return model


def untouched(count: Callable[[], Work]) -> tuple[int, Work]:
    """Operations of matrix products, as torch sees them, and the work that was reported."""
    with FlopCounterMode(display=False) as counter:
        work = count()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return sum(counts.get(op, 0) for op in ("aten.mm", "aten.addmm")), work


LANGUAGE: dict[str, Callable[[], nn.Module]] = {
    "full": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "gpt2_dropout": lambda: tiny_gpt2(dropout=0.1),
    "lora": lambda: with_lora(tiny_llama(), ["q_proj", "v_proj"]),
    "lora_late_in_the_layer": lambda: with_lora(tiny_llama(), ["down_proj"]),
    "lora_everywhere": lambda: with_lora(tiny_llama(), "all-linear"),
    "lora_on_conv1d": lambda: with_lora(tiny_gpt2(), ["c_attn"]),
    "lora_and_a_head": lambda: with_lora(tiny_llama(), ["v_proj"], in_full=["lm_head"]),
    "frozen_below": lambda: with_frozen(tiny_llama(), "*embed_tokens*", "*layers.0.*"),
    "frozen_between": lambda: with_frozen(tiny_llama(), "*layers.1.*", "*norm*"),
    "frozen_embedding_and_norms": lambda: with_frozen(tiny_llama(), "*embed_tokens*", "*norm*"),
    "head_alone": lambda: with_frozen(tiny_llama(), "model.*"),
}


def ledger_of(objective: Objective, batch: Batch, *, activation_checkpointing: bool = False) -> Ledger:
    products = matrix_products(objective, batch, runtime=RUNTIME)
    return Ledger.of(products, activation_checkpointing=activation_checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_back_propagation_costs_what_torch_counts(name: str, checkpointing: bool) -> None:
    model = LANGUAGE[name]()
    objective = CausalLM(model, accepts_logits_to_keep=True)
    ledger = ledger_of(objective, language(1), activation_checkpointing=checkpointing)
    if checkpointing:
        checkpoint_activations(model)
    estimator = FirstOrder(objective, TrainableParameters(model), RUNTIME, seed=1)
    counted, work = untouched(lambda: estimator.estimate([language(3), language(2)], 0).work)
    assert ledger.flops(work) == counted
    assert work == Work(5, 5, 5 * 11, 5 * 11, 5 * 3, 5 * 3)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["full", "tied", "gpt2", "lora"])
def test_evaluations_cost_what_torch_counts(name: str, keep: bool) -> None:
    """Also where the model has no `logits_to_keep`, and the head runs on every token."""
    objective = CausalLM(LANGUAGE[name](), accepts_logits_to_keep=keep)

    @torch.no_grad()
    def evaluate() -> Work:
        objective.module.eval()
        objective.terms(language(3))
        return Work.forward([language(3)])

    counted, work = untouched(evaluate)
    assert ledger_of(objective, language(1)).flops(work) == counted


@pytest.mark.parametrize("model", [tiny_llama_classifier(num_labels=3), tiny_bert_classifier(num_labels=3)])
def test_a_classifier_costs_what_torch_counts(model: nn.Module) -> None:
    """One head is applied to every token, the other, with its pooler, to one vector of each sample."""
    objective = SequenceClassification(model)
    estimator = FirstOrder(objective, TrainableParameters(model), RUNTIME, seed=1)
    counted, work = untouched(lambda: estimator.estimate([classes(3)], 0).work)
    assert ledger_of(objective, classes(1)).flops(work) == counted


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("block", BLOCKS)
def test_reused_layers_are_taken_off(block: str, difference: str) -> None:
    model = tiny_llama()
    objective, parameters = CausalLM(model, accepts_logits_to_keep=True), TrainableParameters(model)
    blocks = model_blocks(model, parameters)
    directions = BlockDirections(HashedDirections(parameters), blocks, order="cyclic")
    estimator = Spsa(
        LossProbe(objective, parameters, directions, RUNTIME),
        RUNTIME,
        num_probes=2,
        eps=1e-3,
        difference=difference,
        seed=1,
    )
    step = next(step for step in range(len(blocks)) if blocks[step].name.endswith(block))
    assert block_at(step, order="cyclic", num_blocks=len(blocks), seed=1) == step
    estimator.estimate([language(2)], step)  # with the proofs that nothing changes, which are not counted
    counted, work = untouched(lambda: estimator.estimate([language(3), language(2)], step).work)
    assert ledger_of(objective, language(1)).flops(work) == counted
    depth = {"layers.1": 1, "norm": 2, "lm_head": 2}.get(block, 0)
    evaluations = {"central": 4, "forward": 3}[difference]
    assert work.reused_layer_tokens == depth * (evaluations - 1) * 5 * 11
    assert work.forward_tokens == evaluations * 5 * 11


def test_the_first_pass_over_a_block_says_what_the_later_ones_say() -> None:
    """A resumed run, which makes its proofs again, reports the same work."""
    model = tiny_llama()
    objective, parameters = CausalLM(model, accepts_logits_to_keep=True), TrainableParameters(model)
    directions = BlockDirections(HashedDirections(parameters), model_blocks(model, parameters), order="cyclic")
    probe = LossProbe(objective, parameters, directions, RUNTIME)
    estimator = Spsa(probe, RUNTIME, num_probes=1, eps=1e-3, difference="central", seed=1)
    works = [estimator.estimate([language(2)], step).work for step in range(2 * len(BLOCKS))]
    assert works[: len(BLOCKS)] == works[len(BLOCKS) :]


def test_a_model_without_layers_and_one_without_matrices() -> None:
    network = NetworkObjective(TinyNetwork(5))
    source = ToySource(normal(4, 5, seed=1, dtype=torch.float32), batch_size=2)
    ledger = ledger_of(network, source.batch([0]))
    assert ledger.flops(Work(forward_tokens=7)) == 2 * 15 * 7
    assert ledger.flops(Work(backward_tokens=7)) == 2 * 15 * 7  # the features need no gradient
    assert Ledger.of([], activation_checkpointing=True).flops(Work(1, 1, 1, 1, 1, 1, 1)) == 0


def test_watching_leaves_nothing_behind() -> None:
    model = tiny_llama(dropout=0.1)
    objective, state = CausalLM(model, accepts_logits_to_keep=True), torch.get_rng_state()
    digest = TrainableParameters(model).digest()
    first = matrix_products(objective, language(1), runtime=RUNTIME)
    assert matrix_products(objective, language(1), runtime=RUNTIME) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert TrainableParameters(model).digest() == digest
    assert all(p.grad is None for p in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_figures_name_the_work() -> None:
    ledger = Ledger.of([], activation_checkpointing=False)
    figures = ledger.figures(Work(1, 2, 3, 4), seconds=5.0)
    assert figures.pop("peak_memory_bytes") > 0
    assert figures == {
        "forward_evals": 1,
        "backward_evals": 2,
        "forward_tokens": 3,
        "backward_tokens": 4,
        "flops": 0,
        "seconds": 5.0,
    }
