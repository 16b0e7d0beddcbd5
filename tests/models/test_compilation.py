"""Compiled layers compute what the plain ones do, whatever is put around them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.tiny import VOCABULARY, tiny_gpt2, tiny_llama
from tests.workspace import LORA, MEZO, VAMO, Workspace, merged
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.kernels import compiler_available
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import Perturber, placed_at
from vamo_ft.models import compilation
from vamo_ft.models.compilation import compile_layers, uncompiled
from vamo_ft.models.loading import checkpoint_activations

KEY = HashKey(3, Domain.DIRECTION, 0, 0)


Graphs = Callable[[], int]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Counts what is compiled; code for the machine, which takes a minute to make, is left out."""
    torch._dynamo.reset()
    counters.clear()
    make = torch.compile

    def without_code(function: Callable[..., Any], *, dynamic: bool, options: dict[str, Any]) -> Callable[..., Any]:
        return make(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(compilation.torch, "compile", without_code)
    monkeypatch.setattr(compilation, "compiler_available", lambda device: True)
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def inputs(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * rows + length)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, rows: int, length: int) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs(rows, length)).logits
    return output


def gradients(model: nn.Module, rows: int, length: int) -> list[Tensor]:
    model.zero_grad()
    model(**inputs(rows, length)).logits.logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def without_cache(model: Any) -> Any:
    model.config.use_cache = False
    return model


def test_all_layers_and_lengths_share_one_graph(graphs: Graphs) -> None:
    plain, model = without_cache(tiny_llama()), without_cache(tiny_llama())
    names = [name for name, _ in model.named_parameters()]
    compile_layers(model)
    for rows, length in ((3, 9), (2, 40), (5, 5)):
        assert torch.equal(logits(model, rows, length), logits(plain, rows, length))
    assert graphs() == 1
    assert [name for name, _ in model.named_parameters()] == names == list(plain.state_dict())[: len(names)]


@pytest.mark.parametrize(("build", "recompute"), [(tiny_gpt2, False), (tiny_llama, True)])
def test_gradients(build: Callable[..., Any], recompute: bool, graphs: Graphs) -> None:
    plain, model = (without_cache(build()).train() for _ in range(2))
    if recompute:
        checkpoint_activations(model)
    compile_layers(model)
    for rows, length in ((3, 9), (2, 17)):
        for ours, theirs in zip(gradients(model, rows, length), gradients(plain, rows, length), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert graphs() > 0


def test_streamed_probe_points_reach_compiled_layers(graphs: Graphs) -> None:
    """Each point is held against changed weights; hooks stay outside, so that they make nothing be compiled anew."""
    plain, model = without_cache(tiny_llama()), without_cache(tiny_llama())
    compile_layers(model)
    logits(model, 3, 9)
    parameters, others = TrainableParameters(model), TrainableParameters(plain)
    directions = HashedDirections(parameters)
    perturber = Perturber(model, parameters, directions)
    at = []
    for eps in (0.05, -0.05, 0.02):
        with perturber.at(KEY, eps):
            assert perturber._layout(directions.support([KEY])).layers
            at.append(perturber.checked(lambda: logits(model, 3, 9)))
        moved = others.copy()
        directions.axpy_(moved, torch.full((1,), eps, dtype=torch.float64), [KEY])
        with placed_at(others, moved):
            assert torch.equal(at[-1], logits(plain, 3, 9))
    assert not torch.equal(at[0], at[1])
    assert not perturber._whole  # the proof found nothing against it
    assert graphs() == 1
    assert torch.equal(logits(model, 3, 9), logits(plain, 3, 9))


def test_generation_is_not_compiled(graphs: Graphs) -> None:
    model = tiny_llama()
    compile_layers(model)
    for _ in range(2):
        with uncompiled(model):
            model.generate(**inputs(2, 6), max_new_tokens=4, do_sample=False)
    assert graphs() == 0
    logits(without_cache(model), 2, 6)
    assert graphs() == 1


def test_no_compiler_and_nothing_to_compile_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "compiler_available", lambda device: False)
    with pytest.raises(UsageError, match=r"model\.compile: needs a C\+\+ compiler"):
        compile_layers(tiny_llama())
    monkeypatch.setattr(compilation, "compiler_available", lambda device: True)
    with pytest.raises(UsageError, match="no stack of layers"):
        compile_layers(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, graphs: Graphs) -> None:
    def failing(graph: object, example_inputs: object) -> Callable[..., Any]:
        raise RuntimeError("no\nsuch instruction")

    make = torch._dynamo.optimize(backend=failing)
    monkeypatch.setattr(compilation.torch, "compile", lambda function, **_: make(function))
    model = without_cache(tiny_llama())
    compile_layers(model)
    with pytest.raises(UsageError, match=r"model\.compile: the compiler fails .*no such instruction.*; leave it out"):
        logits(model, 2, 6)


RUNS: dict[str, dict[str, Any]] = {
    "vamo": {**VAMO, "model": {"adapter": LORA}},
    "mezo": merged(MEZO, {"optimizer": {"learning_rate": 1e-4}}),
    "mezo_bcd": merged(MEZO, {"method": {"name": "mezo_bcd"}, "optimizer": {"learning_rate": 1e-4}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_compiled_run_is_the_run(name: str, workspace: Workspace, graphs: Graphs) -> None:
    """The same losses, and a resumed run ends in the same bits although other lengths come first."""
    workspace.configure(merged(RUNS[name], {"training": {"steps": 6, "batch_size": 4, "micro_batch_size": 3}}))
    assert workspace.train("--set", "run.name=plain") == 0
    assert graphs() == 0
    assert workspace.train("--set", "run.name=whole", "--set", "model.compile=true") == 0
    assert graphs() > 0
    assert workspace.train("--set", "model.compile=true", "--set", "training.steps=3") == 0
    torch._dynamo.reset()
    assert workspace.train("--set", "model.compile=true") == 0
    assert workspace.weights() == workspace.weights("whole")
    plain, whole = ([line["loss"] for line in workspace.metrics(name) if "loss" in line] for name in ("plain", "whole"))
    assert whole == pytest.approx(plain, rel=1e-4) and len(whole) > 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler here")
@pytest.mark.parametrize("name", ["vamo"])
def test_machine_code_of_a_run(name: str, workspace: Workspace) -> None:
    """As above, with the compiler itself."""
    torch._dynamo.reset()
    workspace.configure(merged(RUNS[name], {"training": {"steps": 5, "batch_size": 4, "micro_batch_size": 3}}))
    assert workspace.train("--set", "run.name=plain") == 0
    assert workspace.train("--set", "run.name=whole", "--set", "model.compile=true") == 0
    assert workspace.train("--set", "model.compile=true", "--set", "training.steps=2") == 0
    torch._dynamo.reset()
    assert workspace.train("--set", "model.compile=true") == 0
    assert workspace.weights() == workspace.weights("whole") != workspace.weights("plain")
    plain, whole = ([line["loss"] for line in workspace.metrics(name) if "loss" in line] for name in ("plain", "whole"))
    assert whole == pytest.approx(plain, rel=1e-4)
