import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import VOCABULARY, tiny_gpt2, tiny_llama
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import Perturber
from vamo_ft.core.prefix import PrefixReuse

KEY = HashKey(1, Domain.DIRECTION, 0, 0)


class OnSome(HashedDirections):
    """Directions that reach some tensors only."""

    def __init__(self, parameters: TrainableParameters, reached: Sequence[int]) -> None:
        super().__init__(parameters)
        self.reached = tuple(reached)

    def support(self, keys: Sequence[HashKey]) -> tuple[int, ...]:
        return self.reached


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


def count_runs(layers: Sequence[nn.Module]) -> list[int]:
    """How often each layer's attention has really run."""
    runs = [0] * len(layers)

    def counter(number: int):
        def count(*_: object) -> None:
            runs[number] += 1

        return count

    for number, layer in enumerate(layers):
        next(iter(layer.children())).register_forward_hook(counter(number))
    return runs


def matching(parameters: TrainableParameters, part: str) -> list[int]:
    found = [index for index, name in enumerate(parameters.names) if part in name]
    assert found
    return found


@torch.no_grad()
def evaluated(model: nn.Module, parameters: TrainableParameters, reached: Sequence[int], *, reuse: PrefixReuse | None):
    """Logits at two probe points."""
    perturber = Perturber(model, parameters, OnSome(parameters, reached))
    results = []

    def logits() -> Tensor:
        return model(input_ids=tokens(), use_cache=False).logits

    if reuse is None:
        for sign in (1, -1):
            with perturber.at(KEY, sign * 1e-2):
                results.append(logits())
        return results
    with reuse.batch(reached) as evaluate:
        for sign in (1, -1):
            with perturber.at(KEY, sign * 1e-2):
                results.append(evaluate(logits))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "part", "saved"),
    [
        ("llama", "layers.0.", [0, 0]),
        ("llama", "layers.1.", [1, 0]),
        ("llama", "model.norm", [1, 1]),
        ("llama", "lm_head", [1, 1]),
        ("llama", "embed_tokens", [0, 0]),
        ("tied_llama", "embed_tokens", [0, 0]),
        ("gpt2", "h.0.", [0, 0]),
        ("gpt2", "h.1.", [1, 0]),
        ("gpt2", "ln_f", [1, 1]),
        ("gpt2", "wpe", [0, 0]),
    ],
)
def test_reuse_is_bit_equal_and_skips_the_layers_below(
    name: str, part: str, saved: list[int], dtype: torch.dtype
) -> None:
    model = (tiny_gpt2() if name == "gpt2" else tiny_llama(tied=name == "tied_llama")).to(dtype)
    parameters = TrainableParameters(model)
    reached = matching(parameters, part)
    expected = evaluated(model, parameters, reached, reuse=None)
    assert not torch.equal(*expected)
    reuse = PrefixReuse(model, parameters)
    for _ in range(2):  # the first time it is compared with a plain evaluation
        runs = count_runs(model.transformer.h if name == "gpt2" else model.model.layers)
        actual = evaluated(model, parameters, reached, reuse=reuse)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert runs == [2 - layer for layer in saved]
    assert all("forward" not in vars(module) for module in model.modules())


class Stack(nn.Module):
    """Three layers, run in the given order, the last one also reading what came first."""

    def __init__(self, order: Sequence[int], *, skip: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.order, self.skip = order, skip

    def forward(self, input_ids: Tensor, use_cache: bool) -> "Stack":
        x = input_ids[:, :4].float() / VOCABULARY
        outputs = []
        for number in self.order:
            x = self.layers[number](x)
            outputs.append(x)
        self.logits = x + outputs[0] if self.skip else x
        return self


class TwoStacks(Stack):
    """A second list of layers, which never runs."""

    def __init__(self) -> None:
        super().__init__([0, 1, 2])
        self.others = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Notes(nn.Module):
    """A stack whose layers leave something behind for later ones, as those that share keys and values do."""

    class Layer(nn.Module):
        def __init__(self, notes: dict[int, Tensor], number: int) -> None:
            super().__init__()
            self.linear, self.notes, self.number = nn.Linear(4, 4), notes, number

        def forward(self, x: Tensor) -> Tensor:
            self.notes[self.number] = x
            return self.linear(x) + self.notes[0]

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, Tensor] = {}
        self.layers = nn.ModuleList([self.Layer(self.notes, number) for number in range(3)])

    def forward(self, input_ids: Tensor, use_cache: bool) -> "Notes":
        self.notes.clear()
        x = input_ids[:, :4].float() / VOCABULARY
        for layer in self.layers:
            x = layer(x)
        self.logits = x
        return self


class Logits(Stack):
    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return super().forward(input_ids, use_cache).logits


def test_scores_that_hide_a_difference_prove_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = Logits([0, 1, 2], skip=True)
    parameters = TrainableParameters(model)
    reached = matching(parameters, "layers.2.")
    perturber = Perturber(model, parameters, OnSome(parameters, reached))
    reuse = PrefixReuse(model, parameters)

    def score() -> Tensor:
        return (model(input_ids=tokens(), use_cache=False).sum(1) > -1e6).float()

    with torch.no_grad(), caplog.at_level(logging.INFO, "vamo_ft"), reuse.batch(reached) as evaluate:
        for sign in (1, -1):
            with perturber.at(KEY, sign * 1e-2):
                assert torch.equal(evaluate(score), torch.ones(3))
    assert "differs when" in caplog.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Stack([1, 0, 2]), "one after the other"),
        (Stack([0, 1, 2], skip=True), "differs when"),
        (TwoStacks(), "not one stack of layers"),
        (Notes(), "fails without them (KeyError)"),
    ],
)
def test_what_cannot_be_reused_is_evaluated_in_full(
    model: nn.Module, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = TrainableParameters(model)
    reached = matching(parameters, "layers.2.")
    expected = evaluated(model, parameters, reached, reuse=None)
    reuse = PrefixReuse(model, parameters)
    with caplog.at_level(logging.INFO, "vamo_ft"):
        for _ in range(2):
            actual = evaluated(model, parameters, reached, reuse=reuse)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert caplog.text.count(message) == 1
    assert reuse.depth(reached) == 0
