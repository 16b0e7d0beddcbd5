"""`vamo-ft plan` against what runs really hold and spend."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.limited_device import LimitedDevice
from tests.tiny import tiny_llama
from tests.workspace import ADAMW, LORA, MEZO, PLAIN, VAMO, Workspace, merged
from vamo_ft.assemble.devices import Device
from vamo_ft.assemble.directions import build_directions
from vamo_ft.assemble.memory import MemoryPlan, MemoryPlanner, largest_micro_batch
from vamo_ft.assemble.method import build_update_rule
from vamo_ft.assemble.parts import Parts, build_outline, build_parts
from vamo_ft.assemble.passes import Outlines, Reach
from vamo_ft.assemble.plan import largest_fitting, plan_work
from vamo_ft.assemble.surroundings import Surroundings
from vamo_ft.cli import run
from vamo_ft.config.load import load_config
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.config.planned import other_methods
from vamo_ft.config.schema import RunConfig
from vamo_ft.core import kernels
from vamo_ft.core.allocations import AllocationTrace
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.protocols import Objective
from vamo_ft.core.types import Batch
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import LossProbe, probe_points
from vamo_ft.training.progress import SilentProgress

KEY = HashKey(0, Domain.DIRECTION, 0, 0)
ADAPTER = {"model": {"adapter": LORA}}
MODELS = {
    "all weights": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "adapter": ADAPTER,
    "checkpointing": {"training": {"activation_checkpointing": True}},
    "eager": {"model": {"attn_implementation": "eager"}},
}


def configured(workspace: Workspace, changes: dict[str, Any]) -> RunConfig:
    return load_config(Path(workspace.configure(changes))).config


def planned(config: RunConfig, *, size: int = 6, device_type: str = "cpu") -> MemoryPlan:
    planner = MemoryPlanner(config, build_outline(config, use_cache=False), device_type=device_type)
    return planner.plan(config, micro_batch_size=size)


def real(config: RunConfig) -> Parts:
    return build_parts(config, weights=None, use_cache=False)


def tensors_of(parts: Parts) -> list[Tensor]:
    model = parts.loaded.model
    return [*model.parameters(), *model.buffers()]


def real_peak(parts: Parts, work: Callable[[], object], *, held: Sequence[Tensor] = ()) -> int:
    """Bytes that work on real tensors holds at most, beside those of the model and what else is held."""
    gc.collect()
    with AllocationTrace([*tensors_of(parts), *held]) as trace:
        before = trace.now
        work()
    return trace.peak - before


def saved_bytes(objective: Objective, batch: Batch, weights: list[Tensor]) -> int:
    """Bytes of what autograd saves in a forward pass, each storage once, without weights."""
    saved: dict[int, Tensor] = {}
    kept = {tensor.untyped_storage()._cdata for tensor in weights}

    def save(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in kept:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    objective.module.train()
    with saved_tensors_hooks(save, lambda tensor: tensor):
        total = objective.terms(batch).total
    del total
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_passes_hold_what_they_hold_on_real_tensors(workspace: Workspace, changes: dict[str, Any]) -> None:
    config = configured(workspace, changes)
    loaded, outline = real(config), build_outline(config, use_cache=False)
    batch = loaded.source.batch(range(6))
    estimator = FirstOrder(loaded.objective, loaded.parameters, loaded.runtime, seed=0)
    outlines = Outlines(config, outline)

    assert outlines.training([batch]).total == real_peak(loaded, lambda: estimator.estimate([batch], 0))
    loaded.parameters.clear_gradients()
    held_out = loaded.held_out
    assert held_out is not None
    held = next(held_out.batches(token_budget=400))
    loaded.objective.module.eval()
    with torch.no_grad():
        assert outlines.evaluation(held).total == real_peak(loaded, lambda: loaded.objective.evaluate(held))


@pytest.mark.parametrize("name", ["all weights", "adapter", "eager"])
def test_what_autograd_saves_is_the_same(workspace: Workspace, name: str) -> None:
    config = configured(workspace, MODELS[name])
    loaded, outline = real(config), build_outline(config, use_cache=False)
    batch = loaded.source.batch(range(6))

    expected = saved_bytes(loaded.objective, batch, tensors_of(loaded))
    assert saved_bytes(outline.objective, batch, tensors_of(outline)) == expected > 100_000


def test_probe_points_hold_what_they_hold_on_real_tensors(workspace: Workspace) -> None:
    config = configured(workspace, MEZO)
    loaded, outline = real(config), build_outline(config, use_cache=False)
    batch = loaded.source.batch(range(6))
    reach = Reach(loaded.parameters.numel, rowwise=True, support=tuple(range(len(loaded.parameters.tensors))))
    probe = LossProbe(loaded.objective, loaded.parameters, reach, loaded.runtime)
    points, keys = probe_points("central", num_probes=1, eps=1e-3), (HashKey(0, Domain.DIRECTION, 0, 0),)

    def evaluate() -> None:
        for _ in probe.evaluate([batch], points, keys):
            pass

    expected = real_peak(loaded, evaluate)
    assert Outlines(config, outline).probes([batch], reach).total == pytest.approx(expected, abs=128)  # a few numbers


@pytest.mark.parametrize("changes", [{}, ADAPTER], ids=["full", "adapter"])
def test_streamed_layers_take_the_memory_of_two(workspace: Workspace, changes: dict[str, Any]) -> None:
    config = configured(workspace, merged(MEZO, merged(changes, {"training": {"stream_layers": True}})))
    loaded, layers = real(config), tiny_llama().model.layers
    parameters, stream = loaded.parameters, loaded.loaded.stream
    reach = Reach(parameters.numel, rowwise=True, support=tuple(range(len(parameters.tensors))))
    probe = LossProbe(loaded.objective, parameters, reach, loaded.runtime)
    device = LimitedDevice(10**9, stream=stream, held=tensors_of(loaded))
    batch = loaded.source.batch(largest_micro_batch(loaded.source, 6, num_steps=8))
    with device:
        for _ in probe.evaluate([batch], probe_points("central", num_probes=1, eps=1e-3), (KEY,)):
            pass

    plan = planned(config, device_type="cuda")
    step = next(phase for phase in plan.phases if phase.name == "step")
    hidden = 4 * 32 * batch.inputs["input_ids"].numel()  # of one layer, which may count as kept for the second point
    assert -0.01 * device.peak < plan.weights + step.total - device.peak <= hidden
    assert plan.streamed == sum(parameter.nbytes for parameter in layers.parameters())
    assert planned(config).weights == plan.weights + plan.streamed


def test_the_command_tells_of_layers_on_the_host(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(MEZO)
    assert run(["plan", "config.yaml", "--gpu", "t4", "--set", "training.stream_layers=true"]) == 0
    output = capsys.readouterr().out
    assert "on the host: layers of 0.1 MiB together, which every forward pass copies to the device" in output
    assert "adamw: training.stream_layers: method.name: adamw needs all layers at once" in output


LOW = {"model": {"dtype": "bfloat16"}}
UPDATED = {"full": {}, "adapter": ADAPTER, "low": LOW, "masters": {**LOW, "optimizer": {"master_weights": True}}}


@pytest.mark.parametrize("changes", UPDATED.values(), ids=UPDATED)
def test_weights_gradients_and_optimizer_are_those_of_the_run(workspace: Workspace, changes: dict[str, Any]) -> None:
    config = configured(workspace, merged(changes, ADAMW))
    plan, loaded = planned(config), real(config)
    parameters = loaded.parameters
    estimator = FirstOrder(loaded.objective, parameters, loaded.runtime, seed=0)
    rule = build_update_rule(config, parameters, None)
    estimate = estimator.estimate([loaded.source.batch(range(6))], 0)
    gradients = sum(tensor.grad.nbytes for tensor in parameters.tensors if tensor.grad is not None)
    rule.apply(estimate, learning_rate=1e-3, step=0)
    moments = [value for state in rule.state_dict().values() for value in state.values() if value.ndim > 0]

    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors_of(loaded)}
    assert plan.weights == sum(storage.nbytes() for storage in storages.values())
    assert plan.optimizer == sum(moment.nbytes for moment in moments) > 0
    update = next(phase for phase in plan.phases if phase.name == "update")
    assert update.peak.gradients == gradients
    again = estimator.estimate([loaded.source.batch(range(6))], 1)

    def step() -> None:
        rule.apply(again, learning_rate=1e-3, step=1)

    held = [*moments, *(tensor.grad for tensor in parameters.tensors if tensor.grad is not None)]
    measured = real_peak(loaded, step, held=held) + gradients
    low = (
        config.model.dtype == "bfloat16" and not config.optimizer.master_weights
    )  # whose random bits weigh on a model as small as this
    assert measured == pytest.approx(update.total, rel=0.5 if low else 0.05)


def test_the_compiler_of_kernels_counts_in_main_memory_alone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    along_gradients = {"name": "vamo", "directions": {"structure": "gradient_subspace"}}
    changes = {
        "adamw": {},
        "mezo": MEZO,
        "mezo_bcd": merged(MEZO, {"method": {"name": "mezo_bcd"}}),
        "vamo": VAMO,
        "vamo along gradients": merged(ADAPTER, {"method": along_gradients}),
    }
    configs = {name: configured(workspace, each) for name, each in changes.items()}
    assert planned(configs["mezo"]).compiler == 0  # too small to be worth it
    monkeypatch.setattr(kernels, "_COMPILE_FROM", 1)
    for name, config in configs.items():
        parts = build_outline(config, use_cache=False)
        on_cpu, on_cuda = (
            MemoryPlanner(config, parts, device_type=kind).plan(config, micro_batch_size=6) for kind in ("cpu", "cuda")
        )
        assert on_cpu.compiler == (kernels.COMPILER_BYTES if name in ("mezo", "mezo_bcd", "vamo") else 0)
        assert on_cuda.compiler == 0
        assert on_cpu.peak == on_cuda.peak + on_cpu.compiler
        directions = build_directions(config, real(config).parameters, parts.loaded.model)
        if isinstance(directions, HashedDirections):
            assert directions.kernel(kernels.displace_, torch.ones(2, 2)) is not kernels.displace_


COUNTED: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "vamo": merged(VAMO, {"optimizer": {"name": "adamw"}}),
    "vamo subset": merged(PLAIN, {"method": {"name": "vamo", "source": "recompute", "snapshot": {"every": "3 steps"}}}),
    "mezo": merged(MEZO, {"method": {"probes": 2}}),
    "mezo_bcd": merged(PLAIN, {"method": {"name": "mezo_bcd"}}),
    "mezo_bcd adapter": merged(PLAIN, {**ADAPTER, "method": {"name": "mezo_bcd", "probes": 2}}),
    "svrg": merged(PLAIN, {"method": {"name": "svrg", "snapshot": {"every": "1 epoch"}}}),
    "mezo_svrg": merged(PLAIN, {"method": {"name": "mezo_svrg"}}),
    "addax": merged(PLAIN, {"method": {"name": "addax", "boundary": 28}}),
    "lozo": merged(PLAIN, {"method": {"name": "lozo"}}),
}


@pytest.mark.parametrize("changes", COUNTED.values(), ids=COUNTED)
def test_evaluations_and_flops_are_those_of_the_run(workspace: Workspace, changes: dict[str, Any]) -> None:
    config = configured(workspace, changes)
    assert workspace.train() == 0
    last = [line for line in workspace.metrics() if "loss" in line][-1]
    work = plan_work(
        config,
        build_outline(config),
        Surroundings(progress=SilentProgress(), stop_requested=lambda: False),
        least=config.training.steps or 0,
    )

    assert (work.spent.forward_samples, work.spent.backward_samples) == (last["forward_evals"], last["backward_evals"])
    assert (work.spent.forward_tokens, work.flops) == (last["forward_tokens"], last["flops"])
    assert (work.steps, work.tokens) == (last["step"], last["tokens"])
    assert work.evaluations == len({line["step"] for line in workspace.metrics() if "eval.loss" in line})


def test_the_largest_number_that_fits_is_found() -> None:
    for limit in range(1, 20):
        for most in range(0, 25):
            expected = max((size for size in range(1, limit + 1) if size <= most), default=None)
            assert largest_fitting(lambda size, most=most: size <= most, limit) == expected  # type: ignore[misc]


def test_the_largest_micro_batch_fits_and_the_next_does_not(workspace: Workspace) -> None:
    config = configured(workspace, {"data": {"evaluation": None}, "evaluation": {"metrics": ["loss"], "every": None}})
    parts = build_outline(config, use_cache=False)
    planner = MemoryPlanner(config, parts, device_type="cpu")
    peaks = {size: planner.plan(config, micro_batch_size=size).peak for size in range(1, 7)}
    assert sorted(peaks.values()) == list(peaks.values())
    for memory in (peaks[3], peaks[3] - 1, peaks[1] - 1):
        expected = max((size for size, peak in peaks.items() if peak <= memory), default=None)
        assert largest_fitting(lambda size: peaks[size] <= memory, 6) == expected  # noqa: B023
    longest = largest_micro_batch(parts.source, 3, num_steps=8)
    cells = [
        3 * max(map(parts.source.length, indices[start : start + 3]))
        for indices in map(parts.source.step_indices, range(8))
        for start in (0, 3)
    ]
    assert 3 * max(map(parts.source.length, longest)) == max(cells)


def test_every_method_is_set_beside_the_others(workspace: Workspace) -> None:
    config = configured(workspace, ADAPTER)
    others, refused = other_methods(config, None)
    assert {config.method.name, *others, *refused} == set(METHOD_NAMES)
    assert list(refused) == ["sparse_mezo"]


def test_the_command_tells_memory_work_and_disk(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    config = workspace.configure({"data": {"max_length": 40}})
    (workspace.root / "model" / "model.safetensors").unlink()

    assert run(["plan", config, "--methods", "mezo,vamo", "--gpu", "rtx4090", "--tokens-per-second", "100"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "adamw with adamw, 8 steps of 6 samples in micro-batches of 6",
        "rtx4090 has 23,552.0 MiB: it fits",
        "largest micro-batch that fits: 6 samples, the whole batch",
        "48 forward and 48 backward evaluations",
        "3 passes over the held-out data",
        "disk: a checkpoint has",
        "mezo ",
        "vamo ",
    ):
        assert expected in text, text


def test_a_gguf_file_is_planned_as_it_is_loaded_and_measured(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from tests.tiny_gguf import write_gguf

    write_gguf(workspace.root / "model.gguf")
    config = configured(workspace, {"model": {"path": "model.gguf"}})
    places = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors_of(real(config))}
    assert planned(config).weights == sum(storage.nbytes() for storage in places.values())
    assert run(["plan", "config.yaml", "--methods", "mezo", "--measure"]) == 0
    text = capsys.readouterr().out
    assert "time: 0 min" in text
    assert "of training (" in text


def test_a_model_that_is_shared_out_is_planned_for_one_process(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure(ADAMW)
    said = (
        "planned for one process, which holds all; --processes N plans one of several (training.fsdp), which holds "
        "its part"
    )
    for fsdp in (True, False):
        assert run(["plan", "config.yaml", "--methods", "adamw", "--set", f"training.fsdp={fsdp}"]) == 0
        assert (said in capsys.readouterr().out) == fsdp


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_a_base_in_four_bits_counts_as_that(workspace: Workspace, compute: str) -> None:
    """Seven matrices a layer, with a byte for 64 weights and a float32 for 256 such bytes; the largest in full, too."""
    low = merged(ADAPTER, {"model": {"dtype": "bfloat16"}})
    plain = planned(configured(workspace, low), device_type="cuda")
    quantization = {"model": {"quantization": {"bits": 4, "compute_dtype": compute}}}
    quantized = planned(configured(workspace, merged(low, quantization)), device_type="cuda")
    sizes = [p.numel() for p in tiny_llama().model.layers.parameters() if p.ndim == 2]
    assert len(sizes) == 7 * 2 and all(size % 64 == 0 and size < 64 * 256 for size in sizes)
    four_bits = sum(size // 2 + size // 64 + 4 for size in sizes)
    present = max(sizes) * (2 if compute == "bfloat16" else 2 + 4)  # a backward pass decodes to the weights' precision
    assert quantized.weights == plain.weights - 2 * sum(sizes) + four_bits + present
    assert quantized.phases == plain.phases


def test_the_command_advises_what_goes_with_the_run(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vamo_ft.commands.plan.find_device", lambda gpu: Device("a small GPU", 2**10, "cuda"))
    alone = "planned for one process, which holds all"
    wide, eight = "training.fsdp: true, on several devices", "optimizer.name: adamw_8bit, or paged_adamw_8bit"
    streamed = "training.stream_layers: true"
    advised = {
        "adamw": {wide, eight},
        "mezo": {wide, streamed},
        "svrg": {eight},
    }
    for name, advice in advised.items():
        optimizer = "sgd" if name == "mezo" else "adamw"
        workspace.configure({"method": {"name": name}, "optimizer": {"name": optimizer}})
        assert run(["plan", "config.yaml", "--methods", ""]) == 0
        text = capsys.readouterr().out
        assert {each for each in (wide, eight, streamed) if each in text} == advice
        assert alone not in text
        if wide in advice:
            assert run(["plan", "config.yaml", "--methods", "", "--set", "training.fsdp=true"]) == 0
            text = capsys.readouterr().out
            assert not {each for each in (wide, eight, streamed) if each in text}
            assert alone in text
            assert run(["plan", "config.yaml", "--methods", "", "--set", "training.micro_batch_size=auto"]) == 0
            assert wide not in capsys.readouterr().out


def test_bad_options_are_told_in_a_line(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    config = workspace.configure()
    for options, expected in (
        (["--gpu", "abacus"], "--gpu abacus: is not known; choose from t4,"),
        (["--methods", "mezo,nothing"], "--methods nothing: no such method;"),
        (["--measure", "--tokens-per-second", "3"], "--measure: finds the speed out"),
    ):
        assert run(["plan", config, *options]) == 2
        assert expected in capsys.readouterr().err
