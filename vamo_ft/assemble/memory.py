"""The peak memory of a configured run, part by part, without running it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vamo_ft.assemble.directions import are_compiled
from vamo_ft.assemble.model import resident_parameters
from vamo_ft.assemble.parts import Parts
from vamo_ft.assemble.passes import Outlines, Peak, Reach
from vamo_ft.assemble.space import offloaded_bytes, optimizer_bytes, paged_bytes, snapshot_bytes
from vamo_ft.assemble.surroundings import run_length
from vamo_ft.config.method import (
    AddaxConfig,
    FirstOrderConfig,
    ForwardGradientConfig,
    SpsaConfig,
    SvrgConfig,
    VamoConfig,
    VamoLiteralConfig,
    ZoSvrgConfig,
)
from vamo_ft.config.optimizer import BITSANDBYTES, RULES
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.blocks import model_blocks
from vamo_ft.core.kernels import COMPILER_BYTES
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.stack import stacked_layers
from vamo_ft.core.streaming import streamed_parameters
from vamo_ft.core.types import Batch
from vamo_ft.data.samples import TrainingSamples
from vamo_ft.models.export import saved_sizes
from vamo_ft.models.four_bits import FourBits
from vamo_ft.optim.carriers import Carriers

__all__ = ["MemoryPlan", "MemoryPlanner", "Phase"]

_STEPS = 10_000  # whose batches are looked at for the largest one
_FULL_GRADIENT = 4  # bytes of an element, of svrg and vamo_literal
_ROWWISE = ("full", "block")  # structures that can displace a head row by row
_TEMPORARIES = {"adamw": 2, "adagrad": 1, "sgd": 1, "sign_sgd": 1}
"""Optimizer -> tensors of a parameter's size that torch's rule forms beside its state, and beside the last one of the
parameter before, which its loop still holds."""

_EIGHT_BIT = 5
"""Those that bitsandbytes forms on the CPU, beside 8-bit moments; measured."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of work in a run, and what it holds beside the weights and what is always kept, in bytes.

    Attributes:
        copies: copies of parameters and gradients that the method makes for it.
    """

    name: str
    peak: Peak
    copies: int = 0

    @property
    def total(self) -> int:
        """Bytes."""
        return self.peak.total + self.copies


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes.

    Attributes:
        weights: all parameters and buffers, tied ones once. Of layers that are streamed two, as long as the largest; of
            a base in 4 bits one matrix besides, as large as the largest, as it is multiplied with.
        streamed: layers that are, in host memory.
        adapter: of them those of an adapter.
        optimizer: state of the update rule, with master weights.
        snapshot: what the method keeps between steps.
        exchanged: in which gradients are summed over processes that each hold the whole model.
        host: what of both is in host memory, or may be; it is not in these two.
        compiler: what compiling the kernels of directions takes in main memory, where the run is there.
        phases: what the run does, each of which peaks at another time.
    """

    weights: int
    streamed: int
    adapter: int
    optimizer: int
    snapshot: int
    exchanged: int
    host: int
    compiler: int
    phases: tuple[Phase, ...]

    @property
    def highest(self) -> Phase:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Of the run, once its state is complete."""
        return self.kept + self.highest.total

    @property
    def kept(self) -> int:
        """What all phases hold."""
        return self.weights + self.optimizer + self.snapshot + self.exchanged + self.compiler


class MemoryPlanner:
    """Plans any method on one model and its data; a pass that several of them make is followed once.

    Of several processes it plans the first: shares are rounded up, so that none holds or does more.

    Args:
        parts: an outline.
        device_type: of the memory that is planned: "cpu" or "cuda".
    """

    def __init__(self, config: RunConfig, parts: Parts, *, device_type: str) -> None:
        self._config = config
        self._on_host = device_type == "cpu"  # whose memory is then the device's
        self._parts = parts
        self._streamed: Mapping[nn.Module, Sequence[nn.Parameter]] = {}
        if config.training.stream_layers:
            resident = resident_parameters(config, parts.loaded)
            self._streamed = streamed_parameters(parts.loaded.model, resident=resident)
        self._quantized = 0 if parts.loaded.four_bits is None else _saved(parts.loaded.four_bits, config.model.dtype)
        self._outlines = Outlines(config, parts)
        self._training: dict[int, Peak] = {}
        self._probes: dict[tuple[str, object], Peak] = {}
        self._evaluation: Peak | None = None

    def plan(self, config: RunConfig, *, micro_batch_size: int) -> MemoryPlan:
        """The memory of a run with another method, optimizer or micro-batch than the planner's.

        Args:
            micro_batch_size: at most; several processes cut a step evenly.
        """
        parameters, num_samples = self._parts.parameters, self._parts.source.num_samples
        micro_batch_size = self._parts.runtime.evenly(self._parts.source.batch_size, at_most=micro_batch_size)
        paged = 0 if self._on_host else paged_bytes(config.optimizer, parameters)
        offloaded = 0 if self._on_host else offloaded_bytes(config, parameters, whole=False)
        layers = [sum(parameter.nbytes for parameter in own) for own in self._streamed.values()]
        away = 0 if self._on_host else sum(layers)
        phases = [*self._method_phases(config, micro_batch_size), self._update(config)]
        if self._parts.held_out is not None:
            phases.append(Phase("evaluation", self._evaluated(), self._cache_bytes()))
        if parameters.sharded:
            phases.append(self._checkpoint())
        return MemoryPlan(
            weights=self._outlines.weights - self._quantized + 2 * max(layers, default=0) - away,
            streamed=sum(layers),
            adapter=0 if config.model.adapter is None else sum(tensor.nbytes for tensor in parameters.tensors),
            optimizer=optimizer_bytes(config.optimizer, parameters, whole=False) - paged,
            snapshot=snapshot_bytes(config, parameters, num_samples=num_samples, whole=False) - offloaded,
            exchanged=self._exchanged_bytes(config),
            host=paged + offloaded,
            compiler=self._compiler_bytes(config),
            phases=tuple(phases),
        )

    def _compiler_bytes(self, config: RunConfig) -> int:
        """0 where kernels are compiled for a GPU: that takes memory of the machine around it."""
        return COMPILER_BYTES if self._on_host and are_compiled(config, self._parts.parameters.numel, "cpu") else 0

    def _exchanged_bytes(self, config: RunConfig) -> int:
        """DDP's buckets, as large as the gradients, which it keeps from one step to the next."""
        alone = self._parts.parameters.sharded or isinstance(self._parts.runtime, LocalRuntime)
        differentiated = config.method.needs_gradient and not isinstance(config.method, ForwardGradientConfig)
        return 0 if alone or not differentiated else self._parts.parameters.nbytes

    def _method_phases(self, config: RunConfig, size: int) -> list[Phase]:
        """The estimate of a step, and a snapshot."""
        method, tensors = config.method, self._parts.parameters.tensors
        copy = gradients = sum(tensor.nbytes for tensor in tensors)
        held = Peak(gradients=gradients)
        sums = lent = 0
        if not self._on_host and offloaded_bytes(config, self._parts.parameters):
            copy = _most_lent([tensor.nbytes for tensor in tensors])
            sums = _FULL_GRADIENT * self._parts.parameters.num_held  # on the device while a pass adds to them
            if isinstance(method, VamoConfig) and method.structure == "gradient_subspace":
                rows = [4 * 2 * method.probes * tensor.numel() for tensor in tensors]
                lent = 2 * _most_lent(rows)  # of a sketch, to form the products of its rows
        match method:
            case FirstOrderConfig():
                return [Phase("step", self._trained(size))]
            case SpsaConfig():
                return [Phase("step", self._probed(config, size))]
            case VamoConfig():
                phases = [
                    Phase("step", self._trained(size), lent),
                    Phase("snapshot", self._probed(config, None), lent),
                ]
                if method.source == "recompute":
                    phases.append(Phase("correction", held + self._probed(config, size), copy))
                return phases
            case SvrgConfig():
                return [
                    Phase("step", self._trained(size)),
                    Phase("correction", self._trained(size, again=True), copy),
                    Phase("snapshot", self._trained(None), sums),
                ]
            case ZoSvrgConfig():
                return [
                    Phase("step", self._probed(config, size), copy),
                    Phase("snapshot", self._probed(config, None)),
                ]
            case VamoLiteralConfig():
                return [
                    Phase("step", self._trained(size)),
                    Phase("correction", held + self._probed(config, 1), copy),
                    *([Phase("snapshot", self._probed(config, 1), sums)] if sums else []),
                ]
            case AddaxConfig():
                return [
                    Phase("step", self._trained(size)),
                    Phase("long samples", held + self._probed(config, size), copy),
                ]
            case ForwardGradientConfig():
                plain = self._probed(config, size)
                return [Phase("step", plain + plain, copy)]  # dual numbers, and a direction

    def _update(self, config: RunConfig) -> Phase:
        """What the update rule forms; plain sgd along directions nothing."""
        optimizer, parameters = config.optimizer, self._parts.parameters
        if config.method.projected and optimizer.is_plain_sgd:
            return Phase("update", Peak())
        sizes = [tensor.numel() for tensor in parameters.tensors]
        carried = (4 if optimizer.master_weights else 8) * Carriers(parameters, seed=0).most_together
        formed = _TEMPORARIES[RULES[optimizer.name]]
        temporaries = 4 * max(before + formed * size for before, size in zip([0, *sizes], sizes, strict=False))
        if optimizer.name in BITSANDBYTES:
            temporaries = _EIGHT_BIT * 4 * max(sizes) if self._on_host else 0  # on CUDA it is one kernel
        return Phase("update", Peak(gradients=sum(t.nbytes for t in parameters.tensors)), carried + temporaries)

    def _checkpoint(self) -> Phase:
        """Shared-out tensors are put together one by one, and the first process keeps them on the host."""
        sizes = saved_sizes(self._parts.loaded.model)
        return Phase("checkpoint", Peak(gathered=sum(sizes) if self._on_host else max(sizes)))

    def _trained(self, size: int | None, *, again: bool = False) -> Peak:
        """Forward and backward passes of the largest batch of steps, or (None) of a snapshot."""
        key = 0 if size is None else -size if again else size
        if key not in self._training:
            batch, several = self._largest(size)
            self._training[key] = self._outlines.training([batch] * (2 if several or again else 1))
        return self._training[key]

    def _probed(self, config: RunConfig, size: int | None) -> Peak:
        structure = config.method.structure or "full"
        key = structure, size
        if key not in self._probes:
            batch, several = self._largest(size)
            batches = [batch] * (2 if several else 1)
            peaks = [self._outlines.probes(batches, reach) for reach in self._reaches(structure)]
            self._probes[key] = max(peaks, key=lambda peak: peak.total)
        return self._probes[key]

    def _reaches(self, structure: str) -> Sequence[Reach]:
        """Directions that displace as the method's do; of blocks the largest, and the last layer."""
        parameters, module = self._parts.parameters, self._parts.loaded.model
        supports = [tuple(range(len(parameters.tensors)))]
        if structure == "block":
            blocks = model_blocks(module, parameters)
            in_layers = {id(p) for layer in stacked_layers(module) for p in layer.parameters()}
            largest = max(blocks, key=lambda block: sum(parameters.tensors[index].numel() for index in block.indices))
            layers = [block for block in blocks if id(parameters.tensors[block.indices[0]]) in in_layers]
            supports = [block.indices for block in {block.name: block for block in (largest, *layers[-1:])}.values()]
        elsewhere = {id(parameter) for own in self._streamed.values() for parameter in own}  # displaced where it is
        supports = [
            tuple(index for index in support if id(parameters.tensors[index]) not in elsewhere) for support in supports
        ]
        return [Reach(parameters.numel, rowwise=structure in _ROWWISE, support=support) for support in supports]

    def _evaluated(self) -> Peak:
        held_out = self._parts.held_out
        assert held_out is not None
        if self._evaluation is None:
            batch = next(held_out.batches(token_budget=self._config.training.forward_batch_tokens))
            self._evaluation = self._outlines.evaluation(batch)
        return self._evaluation

    def _cache_bytes(self) -> int:
        """Keys and values of the answers that an evaluation generates; 0 where it generates none."""
        held_out = self._parts.held_out
        if self._config.evaluation.answer_tokens is None or held_out is None:
            return 0
        model = self._parts.loaded.model.config.get_text_config()
        budget = self._config.training.forward_batch_tokens
        heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        size = 4 if self._config.model.dtype == "float32" else 2
        return int(2 * model.num_hidden_layers * heads * width * size * max(budget, held_out.longest))

    def _largest(self, size: int | None) -> tuple[Batch, bool]:
        """The batch of most cells, and whether a process has several in a step."""
        source, training = self._parts.source, self._config.training
        if size is None:
            groups = source.groups(range(source.num_samples), token_budget=training.forward_batch_tokens)
            return source.batch(groups[0]), False
        indices = largest_micro_batch(source, size, num_steps=run_length(self._config, source))
        micro_batches = range(0, source.batch_size, size)
        return source.batch(indices), len(self._parts.runtime.mine(micro_batches)) > 1


def largest_micro_batch(source: TrainingSamples, size: int, *, num_steps: int) -> tuple[int, ...]:
    """The samples of the micro-batch with most cells, padding included, of the first 10,000 steps."""
    best: tuple[int, tuple[int, ...]] = (0, ())
    for step in range(min(num_steps, _STEPS)):
        indices = source.step_indices(step)
        for start in range(0, len(indices), size):
            part = tuple(indices[start : start + size])
            best = max(best, (len(part) * max(map(source.length, part)), part))
    return best[1]


def _most_lent(sizes: Sequence[int]) -> int:
    """The most that a loop over offloaded tensors has on the device: one, and the one before."""
    return max(before + size for before, size in zip([0, *sizes], sizes, strict=False))


def _saved(held: FourBits, dtype: str) -> int:
    """Bytes that matrices in 4 bits take less than in `model.dtype`."""
    width: int = getattr(torch, dtype).itemsize
    return width * sum(held.sizes) - held.num_bytes - held.present_bytes
