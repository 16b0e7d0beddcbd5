"""The same short runs in one process and in several, as a module that a process is started with.

    python -m tests.replicas FOLDER        with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

writes what every run left to FOLDER/<rank>.safetensors.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tests.toys import NetworkObjective, SilentProgress, TinyNetwork, ToySource, normal
from vamo_ft.core.blocks import BlockDirections, model_blocks
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import DriftError, StopRequested, UsageError
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, GradientEstimator, Runtime
from vamo_ft.core.types import Batch
from vamo_ft.estimators.eps_search import EPS_CANDIDATES, RADIUS_CANDIDATES
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.forward_gradient import ForwardGradient
from vamo_ft.estimators.mixed import Addax
from vamo_ft.estimators.passes import SnapshotPasses
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.snapshot import Snapshots, SnapshotSettings
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.estimators.svrg import Svrg, SvrgSettings
from vamo_ft.estimators.vamo import Vamo
from vamo_ft.estimators.vamo_literal import VamoLiteral, VamoLiteralSettings
from vamo_ft.estimators.zo_svrg import ZoSvrg, ZoSvrgSettings
from vamo_ft.optim.carriers import Carriers
from vamo_ft.optim.update_rules import DenseRule, build_optimizer
from vamo_ft.training.evaluation import evaluate
from vamo_ft.training.replicas import ReplicaCheck
from vamo_ft.training.runtime import build_runtime, connected
from vamo_ft.training.state import RunState

SAMPLES, WIDTH, BATCH = 13, 6, 5
STEPS = 4

METHODS = (
    "sgd",
    "adamw",
    "mezo",
    "mezo_bcd",
    "vamo",
    "vamo_adaptive",
    "vamo_recompute",
    "vamo_informed",
    "svrg",
    "zo_svrg",
    "vamo_literal",
    "addax",
    "forward_gradient",
)


def source() -> ToySource:
    """Samples of unequal weight and length; neither they nor a batch can be halved."""
    counts = torch.arange(SAMPLES) % 5 + 1.0
    lengths = [1 + index % 3 for index in range(SAMPLES)]
    return ToySource(normal(SAMPLES, WIDTH, seed=1), batch_size=BATCH, counts=counts, lengths=lengths)


class HeldOut:
    """Three batches of the samples."""

    num_samples = SAMPLES

    def batches(self, *, token_budget: int) -> Iterator[Batch]:
        for group in source().groups(range(SAMPLES), token_budget=token_budget):
            yield source().batch(group)


def build(
    name: str, objective: NetworkObjective, runtime: Runtime, stop: Callable[[], bool]
) -> tuple[GradientEstimator, TrainableParameters, Directions]:
    parameters = TrainableParameters(objective.module)
    directions: Directions = HashedDirections(parameters)
    if name == "mezo_bcd":
        directions = BlockDirections(directions, model_blocks(objective.module, parameters), order="random_permutation")
    if name == "vamo_informed":
        directions = GradientSubspace(parameters, size=2, warmup=3)

    def passes(budget: int = 4) -> SnapshotPasses:
        return SnapshotPasses(budget, SilentProgress(), stop, runtime)

    def due(step: int) -> bool:
        return step % 3 == 0

    first_order = FirstOrder(objective, parameters, runtime, seed=7)
    probe = LossProbe(objective, parameters, directions, runtime)
    snapshot: dict[str, Any] = {"snapshot_due": due, "subset": None, "seed": 7}
    match name:
        case "sgd" | "adamw":
            return first_order, parameters, directions
        case "mezo" | "mezo_bcd":
            spsa = Spsa(probe, runtime, num_probes=2, eps=1e-3, difference="central", seed=7)
            return spsa, parameters, directions
        case "svrg":
            settings = SvrgSettings(alpha_at=lambda step: 0.7, normaliser="data", **snapshot)
            return (
                Svrg(first_order, objective, parameters, runtime, settings=settings, passes=passes()),
                parameters,
                directions,
            )
        case "zo_svrg":
            zo = ZoSvrgSettings(num_probes=2, eps=1e-3, difference="forward", full_step_scale=1.0, **snapshot)
            return ZoSvrg(probe, parameters, runtime, settings=zo, passes=passes()), parameters, directions
        case "vamo_literal":
            sphere = HashedDirections(parameters, distribution="sphere")
            literal = VamoLiteralSettings(num_probes=2, radius=1e-3, alpha=0.5, snapshot_due=due, seed=7)
            return (
                VamoLiteral(first_order, objective, parameters, sphere, runtime, settings=literal, passes=passes(1)),
                parameters,
                directions,
            )
        case "addax":
            spsa = Spsa(probe, runtime, num_probes=1, eps=1e-3, difference="central", seed=7)
            mixed = Addax(first_order, spsa, parameters, directions, runtime, boundary=2, weight=0.3)
            return mixed, parameters, directions
        case "forward_gradient":
            return (
                ForwardGradient(objective, parameters, directions, runtime, num_probes=2, seed=7),
                parameters,
                directions,
            )
    informed = name == "vamo_informed"
    snapshots = Snapshots(
        objective,
        parameters,
        directions,
        runtime,
        settings=SnapshotSettings(
            num_probes=2,
            eps=None,
            candidates=RADIUS_CANDIDATES if informed else EPS_CANDIDATES,
            difference="central",
            subset=None,
            horizon=3,
            source="recompute" if name == "vamo_recompute" else "table",
            orthogonalise=True,
            normaliser="data",
            seed=7,
        ),
        passes=passes(),
    )
    alpha = None if name == "vamo_adaptive" else 0.8
    return Vamo(first_order, snapshots, parameters, directions, alpha=alpha, snapshot_due=due), parameters, directions


def train(name: str, runtime: Runtime, *, size: int, stop_at: int | None = None) -> dict[str, Tensor]:
    """A few steps in float64, with micro-batches of at most `size`; stops at a poll, and goes on, where told to."""
    objective, samples, polls = NetworkObjective(TinyNetwork(WIDTH, dtype=torch.float64)), source(), 0

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return runtime.any(polls == stop_at and runtime.is_main)

    estimator, parameters, directions = build(name, objective, runtime, stop)
    rule = build_optimizer(
        carriers := Carriers(parameters, seed=7), name="adamw" if name == "adamw" else "sgd", weight_decay=0.01
    )
    update = DenseRule(carriers, directions, rule, max_grad_norm=1.0)
    losses, work = [], []
    for step in range(STEPS if name != "vamo_adaptive" else 20):
        try:
            spent = estimator.prepare(samples, step)
        except StopRequested:
            saved = estimator.state_dict()
            estimator, _, directions = build(name, objective, runtime, stop)
            estimator.load_state_dict(saved)
            spent = estimator.prepare(samples, step)
        indices, most = samples.step_indices(step), runtime.evenly(BATCH, at_most=size)
        if step == 1:
            indices = indices[:1]  # one sample for all processes
        batches = [samples.batch(indices[start : start + most]) for start in range(0, len(indices), most)]
        estimate = estimator.estimate(batches, step)
        update.apply(estimate, learning_rate=0.05, step=step)
        losses.append(estimate.loss)
        work.append(torch.tensor(list((spent + estimate.work).state_dict().values())))
    left = {
        f"parameter.{key}": tensor.detach().clone()
        for key, tensor in zip(parameters.names, parameters.tensors, strict=True)
    }
    return left | {"losses": torch.stack(losses), "work": torch.stack(work)}


def cases(runtime: Runtime) -> dict[str, Tensor]:
    """Everything that is compared, by name."""
    found = {}
    for name in METHODS:
        for size in (1, 4):
            found |= {f"{name}.{size}.{key}": value for key, value in train(name, runtime, size=size).items()}
    for name in ("vamo", "svrg", "zo_svrg", "vamo_literal"):
        found |= {f"{name}.stopped.{key}": value for key, value in train(name, runtime, size=4, stop_at=2).items()}
    objective = NetworkObjective(TinyNetwork(WIDTH, dtype=torch.float64))
    result = evaluate(
        objective, HeldOut(), runtime, token_budget=5, progress=SilentProgress(), stop_requested=lambda: False
    )
    found["evaluation"] = torch.tensor([result.loss, result.num_samples], dtype=torch.float64)
    return found


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yields the number of elements of each tensor that the processes exchange within the block."""
    sent: list[int] = []

    def counting(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
            sent.append(tensor.numel())
            return exchange(tensor, *arguments, **keywords)

        return call

    made = dist.all_reduce, dist.broadcast
    dist.all_reduce, dist.broadcast = map(counting, made)
    try:
        yield sent
    finally:
        dist.all_reduce, dist.broadcast = made


def exchanged(name: str, runtime: Runtime) -> Tensor:
    """(2,) numbers that are exchanged before a step, which takes a snapshot where there are any, and in the step."""
    objective, samples = NetworkObjective(TinyNetwork(WIDTH, dtype=torch.float64)), source()
    estimator, parameters, directions = build(name, objective, runtime, lambda: False)
    update = DenseRule(
        carriers := Carriers(parameters, seed=7),
        directions,
        build_optimizer(carriers, name="sgd", weight_decay=0.0),
        max_grad_norm=1.0,
    )
    for step in (0, 3):  # the first one chooses eps
        batches = [samples.batch([index]) for index in samples.step_indices(step)]
        with counted() as before:
            estimator.prepare(samples, step)
        with counted() as within:
            update.apply(estimator.estimate(batches, step), learning_rate=0.05, step=step)
    return torch.tensor([sum(before), sum(within)])


def drift(runtime: Runtime) -> str:
    """What is said when one process's parameters change in a bit; empty where nothing is said."""
    network = TinyNetwork(WIDTH)
    check = ReplicaCheck(TrainableParameters(network), runtime, due=lambda step: step == 4)
    check.at_boundary(RunState(step=4))
    if not runtime.is_main:
        with torch.no_grad():
            network.layer.weight[1, 2] = torch.nextafter(network.layer.weight[1, 2], torch.tensor(9.0))
    check.at_boundary(RunState(step=3))
    try:
        check.at_boundary(RunState(step=4))
    except DriftError as error:
        return str(error)
    return ""


def prepared(runtime: Runtime, *, rank: int) -> Tensor:
    """What a module holds that began with another value in each process."""
    network = TinyNetwork(WIDTH)
    network.register_buffer("seen", torch.zeros(3))
    held = [*network.parameters(), *network.buffers()]
    with torch.no_grad():
        for tensor in held:
            tensor += rank
    runtime.prepared(network)
    return torch.cat([tensor.detach().flatten() for tensor in held])


def unreached(runtime: Runtime) -> str:
    """What is said of a head that no loss uses."""
    network = TinyNetwork(WIDTH)
    network.spare = torch.nn.Linear(2, 1)
    samples = source()
    estimator = FirstOrder(NetworkObjective(network), TrainableParameters(network), runtime, seed=7)
    try:
        estimator.estimate([samples.batch(range(2)), samples.batch(range(2, 5))], 0)
    except UsageError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with connected() as processes:
        assert processes is not None
        runtime = build_runtime(autocast=None)
        found = cases(runtime)
        said = f"{drift(runtime)}\n{unreached(runtime)}"
        flags = [runtime.any(processes.rank == 1), runtime.any(False), runtime.agreed(processes.rank) == 0]
        found |= {f"exchanged.{name}": exchanged(name, runtime) for name in ("sgd", "mezo", "mezo_bcd", "vamo")}
        found["flags"] = torch.tensor(flags)
        found["prepared"] = prepared(runtime, rank=processes.rank)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{processes.rank}.safetensors")
        (folder / f"{processes.rank}.txt").write_text(said)


if __name__ == "__main__":
    main()
