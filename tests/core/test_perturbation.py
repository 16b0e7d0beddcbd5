import logging

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import VOCABULARY, tiny_gpt2, tiny_llama
from tests.toys import TinyNetwork, normal
from vamo_ft.core import perturbation
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.kernels import compiler_available
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import Perturber, placed_at

KEY = HashKey(1, Domain.DIRECTION, 0, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def large_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats the tiny models' embeddings and heads as large ones, cut into parts of 64 rows."""
    monkeypatch.setattr(perturbation, "_ROWWISE_FROM", 1)
    monkeypatch.setattr(perturbation, "_HEAD_ELEMENTS", 64 * 32)


def flat(parameters: TrainableParameters) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])


def language_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_gpt2() if name == "gpt2" else tiny_llama(tied=name == "tied_llama")
    return model.to(dtype)


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def streamed_and_copied(model: nn.Module, directions: HashedDirections) -> tuple[Tensor, Tensor]:
    parameters, results = TrainableParameters(model), []
    for whole in (False, True):
        perturber = Perturber(model, parameters, directions, whole=whole)
        before = parameters.digest()
        with perturber.at(KEY, 1e-2):
            results.append(perturber.checked(lambda: logits(model)))
        assert parameters.digest() == before
    return results[0], results[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_come_back_bit_for_bit(dtype: torch.dtype, fails: bool) -> None:
    network = TinyNetwork(50, dtype=dtype)
    parameters = TrainableParameters(network)
    perturber = Perturber(network, parameters, HashedDirections(parameters, distribution="gaussian"))
    before = parameters.digest()
    memory = [tensor.data_ptr() for tensor in parameters.tensors]
    for attempt in range(20):
        try:
            with perturber.at(KEY._replace(step=attempt), 1e-2):
                assert parameters.digest() != before
                if fails:
                    raise ArithmeticError
        except ArithmeticError:
            pass
        assert parameters.digest() == before
        assert [tensor.data_ptr() for tensor in parameters.tensors] == memory


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_the_probe_point_is_x_plus_eps_z(distribution: str) -> None:
    network = TinyNetwork(50)
    parameters = TrainableParameters(network)
    directions = HashedDirections(parameters, distribution=distribution)
    z = directions.values(KEY, 0, parameters.numel)
    x = flat(parameters)
    with Perturber(network, parameters, directions).at(KEY, -1e-2):
        point = flat(parameters)
    assert torch.allclose(point, x - 1e-2 * z, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_points_of_low_precision_move_by_eps_z_in_the_mean(dtype: torch.dtype) -> None:
    """With nearest rounding a bfloat16 weight of 0.6 would not move at all at eps 1e-3, nor a float16 one at 1e-4."""
    network = TinyNetwork(20_000, dtype=dtype)
    eps = 1e-3 if dtype == torch.bfloat16 else 1e-4
    with torch.no_grad():
        network.layer.weight.fill_(0.6)
    parameters = TrainableParameters(network)
    directions = HashedDirections(parameters)
    z = directions.values(KEY, parameters.offsets[1], parameters.numel).view_as(network.layer.weight)
    old = network.layer.weight.detach().float()
    with Perturber(network, parameters, directions).at(KEY, eps):
        moved = network.layer.weight.detach().float() - old
    assert (moved * z).mean() == pytest.approx(eps, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_streaming_equals_copying_bit_for_bit(
    name: str, dtype: torch.dtype, distribution: str, large_embeddings: None
) -> None:
    model = language_model(name, dtype)
    directions = HashedDirections(TrainableParameters(model), distribution=distribution)
    streamed, copied = streamed_and_copied(model, directions)
    assert torch.equal(streamed, copied)
    assert not torch.equal(streamed, logits(model))


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2"])
def test_streaming_holds_one_layer_at_a_time(name: str, large_embeddings: None) -> None:
    """Within a layer only that layer is displaced; embeddings and heads never are as a whole."""
    model = language_model(name)
    parameters = TrainableParameters(model)
    own = {id(tensor): tensor.data_ptr() for tensor in parameters.tensors}
    small = {id(tensor) for tensor in parameters.tensors if tensor.ndim == 1}
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    seen = []

    def look(layer: nn.Module, *_: object) -> None:
        displaced = {id(tensor) for tensor in parameters.tensors if tensor.data_ptr() != own[id(tensor)]}
        seen.append(displaced - small == {id(tensor) for tensor in layer.parameters() if tensor.ndim > 1})

    perturber = Perturber(model, parameters, HashedDirections(parameters))
    with perturber.at(KEY, 1e-2):
        handles = [layer.register_forward_pre_hook(look) for layer in layers]
        logits(model)
        for handle in handles:
            handle.remove()
    assert seen == [True, True]


def test_a_failing_forward_pass_leaves_everything_as_it_was(large_embeddings: None) -> None:
    model = language_model("tied_llama")
    parameters = TrainableParameters(model)
    before, expected = parameters.digest(), logits(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with (
        pytest.raises(ZeroDivisionError),
        Perturber(model, parameters, HashedDirections(parameters)).at(KEY, 1e-2),
    ):
        logits(model)
    handle.remove()
    assert parameters.digest() == before
    assert torch.equal(logits(model), expected)
    assert all("forward" not in vars(module) for module in model.modules())


class ReadsFromOutside(nn.Module):
    """A stack whose owner uses a weight of its first layer, as several architectures do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TinyNetwork(4, seed=seed).layer for seed in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.nn.functional.pad(layer(x), (0, 1))
        return x * self.layers[0].weight.sum()


def test_a_model_that_reads_a_weight_outside_its_layer_is_copied(caplog: pytest.LogCaptureFixture) -> None:
    model, x = ReadsFromOutside(), torch.ones(2, 4)
    parameters = TrainableParameters(model)
    directions = HashedDirections(parameters)
    results = []
    with caplog.at_level(logging.INFO, "vamo_ft"), torch.no_grad():
        for whole in (False, True):
            perturber = Perturber(model, parameters, directions, whole=whole)
            for _ in range(2):  # the fall-back also holds for later points
                with perturber.at(KEY, 1e-2):
                    results.append(perturber.checked(lambda: model(x)))
    assert [torch.equal(result, results[-1]) for result in results] == [True] * 4
    assert "outside their layer" in caplog.text


class RunsOneStackInAnother(nn.Module):
    """A layer that runs a layer of another stack before it uses its own weight, and the head of the model after it."""

    class Layer(nn.Module):
        def __init__(self, inner: nn.Module, head: nn.Module, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight
            self.__dict__["others"] = (inner, head)  # not its children

        def forward(self, x: Tensor) -> Tensor:
            for other in self.__dict__["others"]:
                x = torch.nn.functional.pad(other(x), (0, 1))
            return x @ self.weight

    def __init__(self) -> None:
        super().__init__()
        linear = [TinyNetwork(4, seed=seed).layer for seed in range(3)]
        self.inner = nn.ModuleList(linear[:2])
        self.head = linear[2]
        weights = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))
        self.outer = nn.ModuleList(
            [self.Layer(inner, self.head, nn.Parameter(w)) for inner, w in zip(self.inner, weights, strict=True)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.outer:
            x = layer(x)
        return x


def test_what_runs_inside_a_layer_leaves_its_displaced_weights_alone(large_embeddings: None) -> None:
    model, x, results = RunsOneStackInAnother(), torch.ones(2, 4), []
    parameters = TrainableParameters(model)
    for whole in (False, True):
        perturber = Perturber(model, parameters, HashedDirections(parameters), whole=whole)
        with torch.no_grad(), perturber.at(KEY, 1e-2):
            results.append(perturber.checked(lambda: model(x)))
    assert torch.equal(*results)


class TwoHeads(nn.Module):
    """Two products outside the layers, over as many vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.dense, self.head = nn.Linear(16, 16), nn.Linear(16, 64)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = layer(features)
        return self.head(self.dense(features))


def test_every_head_is_proven_by_itself(large_embeddings: None) -> None:
    model = TwoHeads()
    parameters = TrainableParameters(model)
    perturber = Perturber(model, parameters, HashedDirections(parameters))
    with torch.no_grad(), perturber.at(KEY, 1e-2):
        model(normal(3, 16, seed=1, dtype=torch.float32))
    names = {parameters.names[index] for index, vectors in perturber._divisible if vectors == 3}
    assert names == {"dense.weight", "head.weight"}


def test_placed_at_writes_the_values_and_restores() -> None:
    network = TinyNetwork(50)
    parameters = TrainableParameters(network)
    before = parameters.digest()
    with placed_at(parameters, [torch.zeros_like(tensor) for tensor in parameters.tensors]):
        assert not network.layer.weight.any()
    assert parameters.digest() == before


@pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler here")
def test_streaming_compiles_nothing_again_when_batches_change_their_size(large_embeddings: None) -> None:
    model = language_model("llama")
    parameters = TrainableParameters(model)
    perturber = Perturber(model, parameters, HashedDirections(parameters, compile_kernels=True))

    def evaluate(rows: int, columns: int, step: int) -> None:
        ids = torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(step))
        with torch.no_grad(), perturber.at(KEY._replace(step=step), 1e-2 * (step + 1)):
            model(input_ids=ids)

    evaluate(3, 7, 0)
    counter = torch._dynamo.utils.counters["stats"]
    before = counter["unique_graphs"]
    assert before > 0
    for step, (rows, columns) in enumerate([(2, 5), (4, 9), (1, 6), (8, 33)], start=1):
        evaluate(rows, columns, step)
    assert counter["unique_graphs"] == before


def test_small_tensors_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of two layers of nine tensors, an embedding, a head and a norm: one launch for each size."""
    model = language_model("llama")
    parameters = TrainableParameters(model)
    directions = HashedDirections(parameters)
    launches = []
    displace = directions._displace
    monkeypatch.setattr(
        directions, "_displace", lambda out, *rest, **named: launches.append(out.shape) or displace(out, *rest, **named)
    )
    with torch.no_grad():
        directions.axpy_(parameters.tensors, torch.ones(1), [KEY])
    assert len(parameters.tensors) == 2 * 9 + 3
    assert len(launches) == len({tensor.numel() for tensor in parameters.tensors}) == 5
