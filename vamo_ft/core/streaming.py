"""Layers that live on the host, and are on the device while they run."""

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vamo_ft.core.errors import UsageError
from vamo_ft.core.stack import owners_of, replays, stacked_layers

__all__ = ["Change", "LayerStream", "streamed_parameters"]

_log = logging.getLogger("vamo_ft")

_ALIGNMENT = 256  # bytes, at which vectorised kernels expect a tensor to begin
_PAGE = 4096  # bytes; memory is pinned in whole pages
_MOST_CHANGES = 8  # that wait for a layer: directions keep the random words of some keys, and not of many

Change = Callable[[Sequence[Tensor], Sequence[int]], None]
"""Changes tensors in place; is told the numbers of the parameters whose values they hold."""


def streamed_parameters(
    module: nn.Module, *, resident: Collection[nn.Parameter] = ()
) -> dict[nn.Module, list[nn.Parameter]]:
    """For each layer that has some the parameters that it alone uses, without `resident` ones."""
    layers = stacked_layers(module)
    stay = {id(parameter) for parameter in resident}
    parameters = [p for p in module.parameters() if id(p) not in stay and p.is_floating_point() and p.numel() > 0]
    own: dict[nn.Module, list[nn.Parameter]] = {}
    for parameter, owners in zip(parameters, owners_of(module, parameters), strict=True):
        if len(owners.layers) == 1 and not owners.outside:
            own.setdefault(layers[owners.layers[0]], []).append(parameter)
    return own


class LayerStream:
    """Holds the layers of a module's stacks in host memory, and two of them at most on the device.

    A layer is brought in when it is entered, while the one behind it is already on its way, and let go of when it is
    left. What changes its parameters waits until then: an update costs no pass over host memory of its own, for the
    layer is written back once, from the pass that needs it anyway. Values of a probe point go on top of that and are
    not written back.

    Outside its layer's forward pass a parameter has no memory and reads as NaN, so that nobody takes values for
    present that are not; `settle` makes what waits and puts the host's values in their place, until the next pass.

    A parameter that several layers share, or a layer and something around it, stays on the device, as does all that is
    not part of a layer. Copies run on a CUDA stream of their own, from and to pinned memory; on another device, and
    where the host cannot pin that much, they run in turn.

    Args:
        module: on the host. What is not streamed moves to the device.
        resident: parameters of layers that stay on the device, such as an adapter's.

    Raises:
        UsageError: the module has no stack of layers with weights of their own.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, resident: Collection[nn.Parameter] = ()) -> None:
        self.device = device
        own = streamed_parameters(module, resident=resident)
        if not own:
            raise UsageError(
                "training.stream_layers: the model has no stack of layers with weights of their own; leave it out"
            )
        self._layers = [_Layer(layer, parameters, device) for layer, parameters in own.items()]
        _move_rest(module, device, streamed={id(parameter) for parameters in own.values() for parameter in parameters})
        self._places = {
            id(parameter): (number, place)
            for number, layer in enumerate(self._layers)
            for place, parameter in enumerate(layer.parameters)
        }
        self._copies = _Copies(device)
        largest = max(layer.nbytes for layer in self._layers)
        self._slots = (self._copies.slot(largest), self._copies.slot(largest))
        self._settled = True
        self._open: int | None = None
        self._displaced: tuple[Change, Mapping[int, _Places]] | None = None
        self._module = module
        self._hooks: list[RemovableHandle] = []
        for number, layer in enumerate(self._layers):
            self._hooks.append(layer.module.register_forward_pre_hook(self._on_entry(number)))
            self._hooks.append(layer.module.register_forward_hook(self._on_exit(number), always_call=True))

    def holds(self, tensor: Tensor) -> bool:
        """Whether the parameter is streamed."""
        return id(tensor) in self._places

    def change(self, tensors: Mapping[int, nn.Parameter], change: Change) -> None:
        """Lets streamed parameters (number -> parameter) be changed, in the order of calls, when they are needed."""
        self._leave()
        for number, places in self._by_layer(tensors).items():
            self._layers[number].waiting.append((change, places))
        if any(len(layer.waiting) > _MOST_CHANGES for layer in self._layers):
            self.settle()

    @contextmanager
    def displaced(self, tensors: Mapping[int, nn.Parameter], change: Change) -> Iterator[None]:
        """Within the block the streamed parameters (number -> parameter) are changed for every pass, and not kept."""
        assert self._displaced is None, "one probe point at a time"
        self._displaced = change, self._by_layer(tensors)
        try:
            yield
        finally:
            self._displaced = None

    def settle(self) -> None:
        """Makes the changes that wait, and lets parameters hold their values, on the host."""
        assert self._open is None and self._displaced is None
        waiting = [number for number, layer in enumerate(self._layers) if layer.waiting]
        for number, following in pairwise([*waiting, None]):
            assert number is not None
            self._brought(number, following)
        if self._settled:
            return
        self._copies.finish()
        for slot in self._slots:
            slot.holds = None  # whoever may read the host's values may write them too
        for layer in self._layers:
            layer.hold(layer.values)
        self._settled = True

    @torch.no_grad()
    def check(self, evaluate: Callable[[], Tensor]) -> None:
        """Whether the module reads the weights of a layer in that layer's forward pass alone.

        Args:
            evaluate: losses by a forward pass of the module.

        Raises:
            UsageError: it reads them elsewhere.
        """
        self._leave()
        if not evaluate().isfinite().all():
            raise UsageError(
                "training.stream_layers: a loss is not finite while layers are not on the device: the model reads "
                "weights of a layer outside of its forward pass, or its weights are not finite; leave it out"
            )
        self.settle()

    def end(self) -> None:
        """Leaves the module to itself, all of it on the host."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        _move_rest(self._module, torch.device("cpu"), streamed=self._places.keys())

    def _by_layer(self, tensors: Mapping[int, nn.Parameter]) -> Mapping[int, "_Places"]:
        found: dict[int, list[tuple[int, int]]] = {}
        for index, tensor in tensors.items():
            number, place = self._places[id(tensor)]
            found.setdefault(number, []).append((place, index))
        return {
            number: _Places(tuple(place for place, _ in pairs), tuple(index for _, index in pairs))
            for number, pairs in found.items()
        }

    def _leave(self) -> None:
        """Lets the parameters read as NaN."""
        if self._settled:
            for layer in self._layers:
                layer.hold(layer.nothing)
            self._settled = False

    def _on_entry(self, number: int) -> Callable[[nn.Module, object], None]:
        def enter(module: nn.Module, arguments: object) -> None:
            if replays(module):
                return
            if self._open is not None:
                raise UsageError("training.stream_layers: the model runs a layer within another one; leave it out")
            self._leave()
            values = self._brought(number, (number + 1) % len(self._layers))
            if self._displaced is not None and number in self._displaced[1]:
                change, places = self._displaced
                places[number].apply(change, values)
            self._layers[number].hold(values)
            self._open = number

        return enter

    def _on_exit(self, number: int) -> Callable[[nn.Module, object, object], None]:
        def leave(module: nn.Module, arguments: object, output: object) -> None:
            if self._open == number:
                self._layers[number].hold(self._layers[number].nothing)
                self._open = None
                if torch.is_autocast_enabled(self.device.type):
                    torch.clear_autocast_cache()  # it keeps weights of low precision for another use

        return leave

    @torch.no_grad()
    def _brought(self, number: int, following: int | None) -> Sequence[Tensor]:
        """A layer's values on the device, changed and written back; the following one is on its way."""
        layer = self._layers[number]
        slot, other = sorted(self._slots, key=lambda slot: slot.holds != number)
        self._bring(number, slot)
        if following is not None and following != number:
            self._bring(following, other)
        self._copies.wait(slot)
        slot.holds = None  # from here on its values are the caller's
        values = layer.views(slot.memory)
        if layer.waiting:
            for change, places in layer.waiting:
                places.apply(change, values)
            layer.memory.copy_(slot.memory[: layer.nbytes], non_blocking=True)
            layer.waiting.clear()
        return values

    def _bring(self, number: int, slot: "_Slot") -> None:
        if slot.holds != number:
            self._copies.fill(slot, self._layers[number].memory)
            slot.holds = number


@dataclass(frozen=True, slots=True)
class _Places:
    """Parameters of one layer: where they stand in it, and their numbers."""

    places: tuple[int, ...]
    indices: tuple[int, ...]

    def apply(self, change: Change, values: Sequence[Tensor]) -> None:
        change([values[place] for place in self.places], self.indices)


class _Layer:
    """The host's values of a layer, all in one stretch of memory.

    Attributes:
        memory: (nbytes,) uint8.
        values: of the parameters, within `memory`. Each is a storage of its own: whoever saves a model takes tensors of
            one storage for tied ones.
        nothing: tensors like them on the device, that take no memory and are NaN.
        waiting: changes that are not made yet.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.module = module
        self.parameters = parameters
        self.waiting: list[tuple[Change, _Places]] = []
        self._begins: list[int] = []
        self.nbytes = 0
        for parameter in parameters:
            self._begins.append(self.nbytes)
            self.nbytes += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = _host_memory(self.nbytes, device, pinned=device.type == "cuda")
        stretches = self.memory.numpy()
        self.values = [
            torch.from_numpy(stretches[begin : begin + parameter.nbytes]).view(parameter.dtype).view(parameter.shape)
            for begin, parameter in zip(self._begins, parameters, strict=True)
        ]
        self.nothing = [
            torch.full((), torch.nan, dtype=parameter.dtype, device=device).expand(parameter.shape)
            for parameter in parameters
        ]
        for parameter, values in zip(parameters, self.values, strict=True):
            values.copy_(parameter.data)
            parameter.data = values

    def views(self, memory: Tensor) -> list[Tensor]:
        """The values in a copy of the layer's memory."""
        return [
            memory[begin : begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            for begin, parameter in zip(self._begins, self.parameters, strict=True)
        ]

    def hold(self, values: Sequence[Tensor]) -> None:
        """Lets the parameters hold these values."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value


@dataclass(slots=True)
class _Slot:
    """Memory for one layer on the device.

    Attributes:
        holds: the number of the layer whose host values are there, or on their way.
        filled: when they are there.
    """

    memory: Tensor
    holds: int | None = None
    filled: torch.cuda.Event | None = field(default=None, repr=False)


class _Copies:
    """Copies to a device, on CUDA beside its computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device) if device.type == "cuda" else None

    def slot(self, nbytes: int) -> _Slot:
        """Memory that copies may write to."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if self._stream is not None:
            memory.record_stream(self._stream)
        return _Slot(memory)

    def fill(self, slot: _Slot, values: Tensor) -> None:
        """Copies host memory to the slot's, once all is computed that was asked for before and may use either."""
        memory = slot.memory[: len(values)]
        if self._stream is None:
            memory.copy_(values)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            memory.copy_(values, non_blocking=True)
            slot.filled = self._stream.record_event()

    def wait(self, slot: _Slot) -> None:
        """What is computed from here on finds the slot filled."""
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)

    def finish(self) -> None:
        """Waits until the host can read what was copied to it."""
        if self._stream is not None:
            torch.cuda.synchronize(self._device)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _move_rest(module: nn.Module, device: torch.device, *, streamed: Collection[int]) -> None:
    for parameter in module.parameters():
        if id(parameter) not in streamed:
            parameter.data = parameter.data.to(device)
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))


def _host_memory(nbytes: int, device: torch.device, *, pinned: bool) -> Tensor:
    """(nbytes,) uint8; pinned as it is, since torch's allocator of pinned memory rounds sizes up to powers of two."""
    if not pinned:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = -(-nbytes // _PAGE) * _PAGE
    whole = torch.empty(pages + _PAGE, dtype=torch.uint8)
    begin = -whole.data_ptr() % _PAGE
    memory, runtime = whole[begin : begin + nbytes], torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.data_ptr()
    if runtime.cudaHostRegister(address, pages, 0) == runtime.cudaError.success:
        weakref.finalize(whole.untyped_storage(), runtime.cudaHostUnregister, address).atexit = False
    else:
        _log.warning("training.stream_layers: the host cannot pin %d bytes; copies of a layer take longer", nbytes)
        with suppress(RuntimeError):  # CUDA keeps the error, and torch would tell it of the next kernel
            torch.ones((), device=device).neg_()
    return memory
