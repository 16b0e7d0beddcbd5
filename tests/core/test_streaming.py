import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.limited_device import LimitedDevice
from tests.tiny import VOCABULARY, tiny_gpt2, tiny_llama
from vamo_ft.core import streaming
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters, all_finite, frozen_digest
from vamo_ft.core.perturbation import Perturber
from vamo_ft.core.stack import Replay, replace_forward
from vamo_ft.core.streaming import LayerStream
from vamo_ft.training.replicas import ReplicaCheck
from vamo_ft.training.state import RunState

CPU = torch.device("cpu")
KEY = HashKey(1, Domain.DIRECTION, 0, 0)


class Layers(nn.Module):
    """Four layers, of which the last two share a matrix, between an embedding and a head."""

    def __init__(self, *, within: bool = False, reads: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.before = nn.Linear(3, 6)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)])
            self.after = nn.Linear(6, 2)
        self.layers[3][0].weight = self.layers[2][0].weight
        self.within, self.reads = within, reads

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.before(features)
        if self.within:
            self.layers[0][0].register_forward_pre_hook(lambda module, arguments: self.layers[1](hidden) and None)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.after(hidden) + (self.layers[1][0].bias.sum() if self.reads else 0)


def features() -> Tensor:
    return torch.linspace(-1, 1, 15).view(5, 3)


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    return module(features())


def shifted_by(amount: float) -> Callable[[Sequence[Tensor], Sequence[int]], None]:
    @torch.no_grad()
    def shift(tensors: Sequence[Tensor], indices: Sequence[int]) -> None:
        for tensor in tensors:
            tensor.add_(amount)

    return shift


def streamed(module: nn.Module, **keywords: Any) -> tuple[LayerStream, TrainableParameters]:
    stream = LayerStream(module, CPU, **keywords)
    return stream, TrainableParameters(module, stream=stream)


def everything(parameters: TrainableParameters) -> range:
    return range(len(parameters.tensors))


def test_a_module_computes_what_it_did() -> None:
    module = Layers()
    digest, expected = TrainableParameters(module).digest(), output(module)
    _, parameters = streamed(module)
    assert parameters.digest() == digest
    assert torch.equal(output(module), expected)
    assert parameters.digest() == digest


def test_what_is_shared_stays_and_what_one_layer_owns_does_not() -> None:
    module = Layers()
    stream, parameters = streamed(module)
    held = {name for name, tensor in zip(parameters.names, parameters.tensors, strict=True) if stream.holds(tensor)}
    assert held == {"layers.0.0.bias", "layers.0.0.weight", "layers.1.0.bias", "layers.1.0.weight"} | {
        f"layers.{number}.0.bias" for number in (2, 3)
    }
    assert module.layers[3][0].weight is module.layers[2][0].weight


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_no_more_than_two_layers_have_memory_on_the_device(model: Callable[[], nn.Module]) -> None:
    """While one layer runs, the parameters of all others are single numbers that are not."""
    module = model()
    layers = module.model.layers if hasattr(module, "model") else module.transformer.h
    largest = max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers)
    stream, _ = streamed(module)
    assert sum(slot.memory.nbytes for slot in stream._slots) < 2 * (largest + 256 * 20)
    slots = {slot.memory.untyped_storage().data_ptr() for slot in stream._slots}
    seen = []

    def look(running: nn.Module, *_: object) -> None:
        for layer in layers:
            places = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
            here = len(places) == 1 and places <= slots
            away = all(parameter.untyped_storage().nbytes() <= 4 for parameter in layer.parameters())
            assert here if layer is running else away
        seen.append(running)

    for layer in layers:
        layer.register_forward_pre_hook(look)
    with torch.no_grad():
        module(input_ids=torch.arange(3, 13).view(1, 10) % VOCABULARY)
    assert seen == list(layers)


def test_what_autocast_makes_of_a_layer_goes_with_it() -> None:
    """It would keep the low-precision weights of all layers until its end."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(16)])

        def forward(self, hidden: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    module, twin = Deep(), Deep()
    twin.load_state_dict(module.state_dict())
    stream, _ = streamed(module)
    hidden, device = torch.ones(1, 64), LimitedDevice(4 * 64 * 64 * 4, stream=stream)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = twin(hidden)
        with device:
            assert torch.equal(module(hidden), expected)


def test_a_change_waits_for_the_next_pass_and_is_made_once() -> None:
    module, twin = Layers(), Layers()
    stream, parameters = streamed(module)
    parameters.change(everything(parameters), shifted_by(0.25))
    for tensor in TrainableParameters(twin).tensors:
        tensor.data.add_(0.25)
    assert not all_finite(parameters.tensors)  # who does not settle reads no value that is not present
    device = LimitedDevice(10**6, stream=stream)
    with device:
        assert torch.equal(output(module), output(twin))
        assert torch.equal(output(module), output(twin))
    assert device.write_backs == 4
    assert device.uploads == 4 + 4 + 1  # the first layer of a third pass is on its way
    parameters.settle()
    assert TrainableParameters(module).digest() == TrainableParameters(twin).digest()


def test_changes_are_made_in_their_order_before_anybody_reads() -> None:
    module, twin = Layers(), Layers()
    _, parameters = streamed(module)
    for step in range(30):
        amount = (-1) ** step * 0.3 / (step + 1)
        parameters.change(everything(parameters), shifted_by(amount))
        for tensor in TrainableParameters(twin).tensors:
            tensor.data.add_(amount)
        if step % 7 == 3:
            output(module)
    assert parameters.digest() == TrainableParameters(twin).digest()
    assert torch.equal(output(module), output(twin))


def test_directions_reach_probe_points_and_updates_as_without_a_stream() -> None:
    ids = torch.arange(3, 43).view(2, 20)
    outputs, digests = [], []
    for with_stream in (False, True):
        module = tiny_llama(tied=True).to(torch.bfloat16)
        parameters = streamed(module)[1] if with_stream else TrainableParameters(module)
        directions = HashedDirections(parameters, distribution="sphere")
        perturber = Perturber(module, parameters, directions)

        def move(tensors: Sequence[Tensor], indices: Sequence[int], directions: HashedDirections = directions) -> None:
            directions.axpy_(tensors, torch.tensor([0.1]), [KEY], rounding=KEY, indices=indices)

        for coefficient in (1e-2, -1e-2):
            with perturber.at(KEY, coefficient), torch.no_grad():
                outputs.append(perturber.checked(lambda module=module: module(input_ids=ids).logits))
            parameters.change(everything(parameters), move)
        with torch.no_grad():
            outputs.append(module(input_ids=ids).logits)
        digests.append(parameters.digest())
    assert all(torch.equal(plain, held) for plain, held in zip(outputs[:3], outputs[3:], strict=True))
    assert not torch.equal(outputs[0], outputs[1])
    assert digests[0] == digests[1]


def test_a_failure_within_a_layer_leaves_everything_as_it_was() -> None:
    module = Layers()
    expected, digest = output(module), TrainableParameters(module).digest()
    _, parameters = streamed(module)
    handle = module.layers[1][1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), parameters.displaced(everything(parameters), shifted_by(0.5)):
        output(module)
    handle.remove()
    assert torch.equal(output(module), expected)
    assert parameters.digest() == digest


def test_a_change_that_fails_is_made_again_from_the_hosts_values() -> None:
    module, twin = Layers(), Layers()
    _, parameters = streamed(module)
    calls = []

    def shift(tensors: Sequence[Tensor], indices: Sequence[int]) -> None:
        shifted_by(0.5)(tensors, indices)
        calls.append(indices)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")

    parameters.change(everything(parameters), shift)
    with pytest.raises(torch.OutOfMemoryError):
        output(module)
    for tensor in TrainableParameters(twin).tensors:
        tensor.data.add_(0.5)
    assert torch.equal(output(module), output(twin))
    assert parameters.digest() == TrainableParameters(twin).digest()


def test_a_layer_whose_output_is_known_is_not_brought_in() -> None:
    module = Layers()
    stream, _ = streamed(module)
    value = output(module)[:, :1].expand(5, 6)
    for layer in module.layers[:3]:
        replace_forward(layer, Replay(value, like=layer.forward))
    stream.settle()
    device = LimitedDevice(10**6, stream=stream)
    with device:
        output(module)
    assert device.uploads == 2  # the fourth, and behind it the first


def test_an_adapters_tensors_stay_and_the_frozen_rest_is_found_by_its_digest() -> None:
    module = Layers()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    trained = [layer[0].bias.requires_grad_() for layer in module.layers]
    digest = frozen_digest(module)
    stream, parameters = streamed(module, resident=trained)
    assert not any(stream.holds(tensor) for tensor in trained)
    assert stream.holds(module.layers[0][0].weight)
    output(module)
    assert frozen_digest(module) != digest
    parameters.settle()
    assert frozen_digest(module) == digest


def test_processes_compare_values_that_are_present() -> None:
    class Told:
        device = CPU

        def differing(self, values: Callable[[], Tensor]) -> list[int]:
            sums.append(values())
            return []

    sums: list[Tensor] = []
    module, twin = Layers(), Layers()
    _, parameters = streamed(module)
    parameters.change(everything(parameters), shifted_by(0.25))
    for tensor in TrainableParameters(twin).tensors:
        tensor.data.add_(0.25)
    for each in (parameters, TrainableParameters(twin)):
        ReplicaCheck(each, Told(), due=lambda step: True).at_boundary(RunState(step=1))
    assert torch.equal(*sums)


def test_after_the_end_the_module_is_its_own() -> None:
    module = Layers()
    expected = output(module) + 0
    stream, parameters = streamed(module)
    parameters.change(everything(parameters), shifted_by(0.0))
    stream.end()
    assert torch.equal(output(module), expected)
    assert all_finite(list(module.parameters()))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.layers)


def test_a_model_that_reads_a_layers_weights_elsewhere_is_refused() -> None:
    stream, _ = streamed(Layers())
    plain = Layers()
    streamed(plain)[0].check(lambda: output(plain))
    module = Layers(reads=True)
    stream, _ = streamed(module)
    with pytest.raises(UsageError) as error:
        stream.check(lambda: output(module))
    assert str(error.value) == (
        "training.stream_layers: a loss is not finite while layers are not on the device: the model reads weights of a "
        "layer outside of its forward pass, or its weights are not finite; leave it out"
    )


def test_a_layer_within_a_layer_is_refused() -> None:
    module = Layers(within=True)
    streamed(module)
    with pytest.raises(UsageError) as error:
        output(module)
    assert str(error.value) == "training.stream_layers: the model runs a layer within another one; leave it out"


def test_a_module_without_layers_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        LayerStream(nn.Linear(2, 2), CPU)
    assert str(error.value) == (
        "training.stream_layers: the model has no stack of layers with weights of their own; leave it out"
    )


class LastError(TorchDispatchMode):
    """CUDA's: of a call that failed, told of the next kernel."""

    kept = False

    def __torch_dispatch__(
        self, operation: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.kept and operation is not torch.ops.aten.empty.memory_format:
            self.kept = False
            raise RuntimeError("CUDA error: out of memory")
        return operation(*args, **(kwargs or {}))


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = LastError()

    def fail(address: int, nbytes: int, flags: int) -> int:
        error.kept = True
        return 2

    runtime = SimpleNamespace(cudaHostRegister=fail, cudaError=SimpleNamespace(success=0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with error, caplog.at_level(logging.WARNING, logger="vamo_ft"):
        memory = streaming._host_memory(5000, CPU, pinned=True)
        assert memory.fill_(7).sum(dtype=torch.int64) == 7 * 5000
    assert not error.kept
    assert caplog.messages == [
        "training.stream_layers: the host cannot pin 5000 bytes; copies of a layer take longer",
    ]
