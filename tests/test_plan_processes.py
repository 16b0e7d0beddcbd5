"""`vamo-ft plan --processes` against what processes really hold, and how they share passes out."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule

from tests.test_processes import finish, start
from tests.tiny import tiny_llama
from tests.workspace import ADAMW, LORA, MEZO, VAMO, Workspace, merged
from vamo_ft.assemble.devices import Device
from vamo_ft.assemble.memory import MemoryPlan, MemoryPlanner
from vamo_ft.assemble.parts import build_outline
from vamo_ft.assemble.passes import Outlines, Reach
from vamo_ft.assemble.shares import shares_of
from vamo_ft.cli import run
from vamo_ft.config.load import load_config
from vamo_ft.config.schema import RunConfig
from vamo_ft.training.pretended import pretended

SHARED = {"training": {"fsdp": True}}
CASES: dict[str, dict[str, Any]] = {
    "shared": merged(ADAMW, SHARED),
    "shared-adapter": merged(merged(ADAMW, SHARED), {"model": {"adapter": LORA}}),
    "replicated": ADAMW,
}


def configured(workspace: Workspace, changes: dict[str, Any], *, file: str = "config.yaml") -> RunConfig:
    return load_config(workspace.root / workspace.configure(changes, file=file)).config


def planned(config: RunConfig, *, processes: int, size: int = 6, device_type: str = "cpu") -> MemoryPlan:
    with pretended(processes) as together:
        parts = build_outline(config, use_cache=False, processes=together)
        return MemoryPlanner(config, parts, device_type=device_type).plan(config, micro_batch_size=size)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Mapping[str, list[dict[str, int]]]]:
    """What two processes held in each case."""
    workspace = Workspace(tmp_path_factory.mktemp("measured"))
    files = [workspace.configure(case, file=f"{name}.yaml") for name, case in CASES.items()]
    codes, errors = finish(start("tests.held_memory", *files, cwd=workspace.root))
    assert codes == [0, 0], errors
    return workspace, {
        name: [json.loads((workspace.root / f"{name}.yaml.{rank}.json").read_text()) for rank in range(2)]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_outlines_hold_what_the_first_of_two_processes_does(
    name: str, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, found = measured
    monkeypatch.chdir(workspace.root)
    first, second = found[name]
    config = load_config(workspace.root / f"{name}.yaml").config
    with pretended(2) as together:
        parts = build_outline(config, use_cache=False, processes=together)
        outlines, parameters, batch = (
            Outlines(config, parts),
            parts.parameters,
            parts.source.batch(range(3)),
        )
        assert outlines.weights == first["weights"] >= second["weights"]
        assert parameters.num_held == first["elements"] >= second["elements"]
        # Bytes of a step's losses, which have places for the other process's too, and of small parts on their way: when
        # gloo lets go of those depends on the machine. A layer has 37,120.
        few = 2048
        for passes, key in ((1, "one pass"), (2, "two passes")):
            assert outlines.training([batch] * passes).total == pytest.approx(first[key], abs=few)
            assert first[key] >= second[key] - few
        reach = Reach(parameters.numel, rowwise=True, support=tuple(range(len(parameters.tensors))))
        assert outlines.probes([batch], reach).total == pytest.approx(first["probes"], abs=few)
        plan = MemoryPlanner(config, parts, device_type="cuda").plan(config, micro_batch_size=3)
        on_host = MemoryPlanner(config, parts, device_type="cpu").plan(config, micro_batch_size=3)
    kept, passing = ([phase.total for phase in each.phases if phase.name == "checkpoint"] for each in (on_host, plan))
    if name.startswith("shared"):  # the second process fills its rows up before it sends them
        assert kept == [pytest.approx(first["checkpoint"], abs=few)]
        assert passing[0] <= second["checkpoint"] < 2 * passing[0] + few
    else:
        assert kept == passing == []
    assert plan.optimizer == first["optimizer"] >= second["optimizer"]
    assert plan.exchanged == first["exchanged"]


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_each_process_holds_the_rows_that_torch_deals_out(workspace: Workspace, processes: int) -> None:
    """The first has most; what falls to others is filled up to the same memory."""
    model = tiny_llama()
    shares = [
        [parameter.chunk(processes)[rank : rank + 1] for parameter in model.parameters()] for rank in range(processes)
    ]
    elements = [sum(rows.numel() for each in share for rows in each) for share in shares]
    assert elements[0] == max(elements) > elements[-1]
    buffers = sum(buffer.nbytes for buffer in model.buffers())

    plan = planned(configured(workspace, CASES["shared"]), processes=processes)
    assert plan.weights == 4 * elements[0] + buffers
    assert plan.optimizer == 2 * 4 * elements[0]
    assert plan.exchanged == 0
    update = next(phase for phase in plan.phases if phase.name == "update")
    assert update.peak.gradients == 4 * elements[0]
    masters = merged(CASES["shared"], {"model": {"dtype": "bfloat16"}, "optimizer": {"master_weights": True}})
    assert planned(configured(workspace, masters), processes=processes).optimizer == 3 * 4 * elements[0]


def test_a_snapshot_is_kept_in_parts_and_its_table_whole(workspace: Workspace) -> None:
    changes = merged(merged(VAMO, {"method": {"source": "recompute"}}), SHARED)
    informed = merged(
        SHARED, {"method": {"name": "vamo", "probes": 2, "directions": {"structure": "gradient_subspace"}}}
    )
    elements = sum(parameter.chunk(2)[0].numel() for parameter in tiny_llama().parameters())
    table = 20 * (8 * 2 + 5)
    assert planned(configured(workspace, changes), processes=2).snapshot == table + 4 * elements
    assert planned(configured(workspace, informed), processes=2).snapshot == table + 4 * (3 * 2 + 1) * elements


def test_gradients_are_summed_in_memory_of_their_own(workspace: Workspace) -> None:
    gradients = 4 * sum(parameter.numel() for parameter in tiny_llama().parameters())
    for changes, expected in ((merged(VAMO, ADAMW), gradients), (MEZO, 0)):
        alone, one_of_two = (planned(configured(workspace, changes), processes=count, size=3) for count in (1, 2))
        assert (alone.exchanged, one_of_two.exchanged) == (0, expected)
        assert (one_of_two.weights, one_of_two.optimizer) == (alone.weights, alone.optimizer)


def test_nothing_of_a_model_that_is_shared_out_takes_memory(workspace: Workspace) -> None:
    config = configured(workspace, CASES["shared"])
    with pretended(2) as together:
        parts = build_outline(config, use_cache=False, processes=together)
        Outlines(config, parts).training([parts.source.batch(range(3))])
        kept = [each for unit in parts.loaded.model.modules() for each in _put_together(unit)]
        assert len(kept) == len(parts.parameters.tensors)
        assert all(isinstance(each, FakeTensor) for each in (*parts.parameters.tensors, *kept))


def _put_together(unit: nn.Module) -> list[Tensor]:
    """What FSDP2 puts the parameters of a unit together in."""
    if not isinstance(unit, FSDPModule):
        return []
    group = unit._get_fsdp_state()._fsdp_param_group
    assert group is not None
    return [output for parameter in group.fsdp_params for output in parameter.all_gather_outputs]


@pytest.mark.parametrize(("processes", "fsdp"), [(1, False), (2, False), (3, True), (4, False), (5, False), (9, False)])
def test_passes_are_dealt_out_evenly(processes: int, fsdp: bool, workspace: Workspace) -> None:
    config = configured(workspace, {"training": {"fsdp": fsdp, "forward_batch_tokens": 60}})
    with pretended(processes) as together:
        parts = build_outline(config, use_cache=False, processes=together)
        source, held_out = parts.source, parts.held_out
        assert held_out is not None
        for most in (1, 2, 4, 6):
            shares = shares_of(config, parts, micro_batch_size=most)
            each = -(-6 // processes)  # samples of a process, in pieces of which all have equally many
            size = next(size for size in range(1, 7) if -(-each // size) == -(-each // most))
            pieces = [min(size, 6 - start) for start in range(0, 6, size)]
            dealt = [sum(pieces[rank::processes]) for rank in range(processes)]
            assert sum(dealt) == 6
            assert shares.step == max(dealt) / 6
        groups = source.groups(range(20), token_budget=60)
        tokens = [
            sum(source.length(index) for group in groups[rank::processes] for index in group) for rank in range(2)
        ]
        assert shares.snapshot == pytest.approx(tokens[0] / sum(map(source.length, range(20))))
        batches = [batch.num_tokens for batch in held_out.batches(token_budget=60)]
        assert len(batches) > 1
        assert shares.evaluation == pytest.approx(sum(batches[::processes]) / sum(batches), rel=0.03)  # label tokens


def test_the_command_tells_what_one_of_several_processes_needs(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workspace.configure(ADAMW)
    options = ["--methods", "mezo,svrg", "--gpu", "rtx4090", "--processes", "4", "--tokens-per-second", "100"]
    assert run(["plan", config, *options]) == 0
    text = capsys.readouterr().out
    for expected in (
        "adamw with adamw, 8 steps of 6 samples in micro-batches of 2",
        "4 processes; of a step's 6 samples the busiest takes 2",
        "each holds the whole model, and all that the optimizer and snapshots keep",
        "summed gradients  ",
        "rtx4090 has 23,552.0 MiB: it fits",
        "largest micro-batch that fits: 2 samples, a process's whole share of the batch",
        "48 forward and 48 backward evaluations",
        "FLOPs, of which the busiest process makes 33.3%",
        "of training (300 tokens/s by all processes, at the speed of one alone: exchange is not counted)",
        "svrg  ",
    ):
        assert expected in text, text

    assert run(["plan", config, *options, "--set", "training.fsdp=true"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "each holds its part of weights, gradients and what the optimizer keeps, and puts layers together while they "
        "run; planned is the first, which holds most",
        "parts put together  ",
        "checkpoint\n",
        "svrg: training.fsdp: method.name: svrg needs whole tensors in every process",
    ):
        assert expected in text, text
    assert "summed gradients" not in text

    assert run(["plan", config, "--processes", "4", "--methods", "", "--measure"]) == 0
    assert "main memory for each of 4 has" in capsys.readouterr().out


def test_processes_of_one_machine_share_its_main_memory() -> None:
    here, gpu = Device("this machine's main memory", 1000, "cpu"), Device("a GPU", 1000, "cuda")
    assert here.shared_by(3) == Device("this machine's main memory for each of 3", 333, "cpu")
    assert here.shared_by(1) is here
    assert gpu.shared_by(3) is gpu


def test_so_many_processes_that_it_fits_are_found(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(workspace, merged(CASES["shared"], {"training": {"micro_batch_size": 1}}))
    two, four = (planned(config, processes=count, size=1, device_type="cuda").peak for count in (2, 4))
    assert four < two
    for memory, number, expected in (
        (four, 1, "4 processes (--processes 4)"),
        (four, 4, None),
        (1000, 1, None),
    ):
        device = Device("a small GPU", memory, "cuda")
        monkeypatch.setattr("vamo_ft.commands.plan.find_device", lambda gpu, device=device: device)
        assert run(["plan", "config.yaml", "--methods", "", "--processes", str(number)]) == 0
        text = capsys.readouterr().out
        assert ("not even a micro-batch of 1 sample fits" in text) == (number == 1)
        assert (f"what to change: {expected}; " in text) if expected else (" processes (--" not in text)


def test_what_several_processes_do_not_take_is_told_as_for_training(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.configure({"method": {"name": "svrg"}})
    shared = ["--set", "training.fsdp=true"]
    assert run(["train", "config.yaml", *shared]) == 2
    said = capsys.readouterr().err
    assert "training.fsdp: method.name: svrg needs whole tensors in every process; leave it out" in said
    assert run(["plan", "config.yaml", *shared, "--processes", "2"]) == 2
    assert capsys.readouterr().err == said
    for number, limit in ((0, "greater than or equal to 1"), (1025, "less than or equal to 1024")):
        assert run(["plan", "config.yaml", "--processes", str(number)]) == 2
        assert f"Invalid value for '--processes': Input should be {limit}" in capsys.readouterr().err
