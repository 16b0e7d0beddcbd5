"""What every estimator promises, run over all of them."""

import pytest
import torch

from tests.estimators.relatives import build_svrg, build_zo_svrg
from tests.toys import NetworkObjective, TinyNetwork, ToySource, build_literal, build_vamo, gradient, normal
from vamo_ft.core.blocks import Block, BlockDirections
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.errors import StopRequested
from vamo_ft.core.factored import LowRankDirections, SubspaceDirections
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Directions, GradientEstimator
from vamo_ft.core.runtime import LocalRuntime
from vamo_ft.core.sparse import SparseDirections
from vamo_ft.core.types import Estimate, LossTerms, Work
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.forward_gradient import ForwardGradient
from vamo_ft.estimators.mixed import Addax
from vamo_ft.estimators.probes import LossProbe
from vamo_ft.estimators.spsa import Spsa
from vamo_ft.objectives.stoppable import StoppableObjective

SPSA = ("spsa_central", "spsa_forward", "spsa_block", "spsa_low_rank", "spsa_subspace", "spsa_sparse")
FORWARD = ("forward_gradient", "forward_block", "forward_low_rank", "forward_subspace", "forward_sparse")
ZEROTH_ORDER = (*SPSA, "zosvrg_full_steps", "zosvrg", *FORWARD)
MIXED = ("addax", "addax_block")
INFORMED = ("vamo_informed", "vamo_informed_recompute")
VAMO = ("vamo_table", "vamo_recompute", "vamo_auto_eps", *INFORMED, "vamo_literal")
ESTIMATORS = ("first_order", "svrg", *VAMO, *MIXED, *ZEROTH_ORDER)
WIDTH, SAMPLES = 40, 48


def build(name: str, objective: NetworkObjective) -> GradientEstimator:
    parameters, runtime = TrainableParameters(objective.module), LocalRuntime()
    match name.split("_", 1):
        case ["first", _]:
            return FirstOrder(objective, parameters, runtime, seed=7)
        case ["spsa", form]:
            probe = LossProbe(objective, parameters, build_directions(form, parameters), runtime)
            difference = "forward" if form == "forward" else "central"
            return Spsa(probe, runtime, num_probes=3, eps=1e-3, difference=difference, seed=7)
        case ["vamo", "auto_eps"]:
            return build_vamo(objective, eps=None)
        case ["vamo", "informed" | "informed_recompute" as form]:
            directions = GradientSubspace(parameters, size=2, warmup=3)
            for step in range(4):
                directions.observe([normal(*tensor.shape, seed=step) for tensor in parameters.tensors])
            source = "recompute" if form.endswith("recompute") else "table"
            return build_vamo(objective, directions=directions, eps=1e-2, alpha=None, source=source)
        case ["addax", *form]:
            directions = build_directions(form[0] if form else "full", parameters)
            probe = LossProbe(objective, parameters, directions, runtime)
            spsa = Spsa(probe, runtime, num_probes=2, eps=3e-3, difference="central", seed=7)
            first_order = FirstOrder(objective, parameters, runtime, seed=7)
            return Addax(first_order, spsa, parameters, directions, runtime, boundary=2, weight=0.1)
        case ["forward", form]:
            directions = build_directions(form, parameters)
            return ForwardGradient(objective, parameters, directions, runtime, num_probes=2, seed=7)
        case ["vamo", "literal"]:
            return build_literal(objective)
        case ["vamo", source]:
            return build_vamo(objective, source=source, eps=1e-3)
        case ["svrg"]:
            return build_svrg(objective)
        case ["zosvrg"]:
            return build_zo_svrg(objective, num_probes=3)
        case ["zosvrg", "full_steps"]:
            return build_zo_svrg(objective, snapshot_due=lambda step: True, full_step_scale=10.0)
    raise AssertionError(name)


def build_directions(form: str, parameters: TrainableParameters) -> Directions:
    match form:
        case "block":
            blocks = (Block("bias", (0,)), Block("weight", (1,)))
            return BlockDirections(HashedDirections(parameters), blocks, order="random_permutation")
        case "low_rank":
            return LowRankDirections(parameters, rank=2, refresh_every=2)
        case "subspace":
            return SubspaceDirections(parameters, rank=2, refresh_every=2)
        case "sparse":
            return SparseDirections(parameters, quantile=0.25)
    return HashedDirections(parameters)


def problem(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> tuple[NetworkObjective, ToySource]:
    counts = torch.arange(SAMPLES) % 4 + 1.0
    lengths = [1 + index % 3 for index in range(SAMPLES)]
    source = ToySource(normal(SAMPLES, WIDTH, seed=1, dtype=dtype), batch_size=16, counts=counts, lengths=lengths)
    return NetworkObjective(TinyNetwork(WIDTH, dtype=dtype, dropout=dropout)), source


def run(estimator: GradientEstimator, source: ToySource, *, step: int = 0, parts: int = 1) -> Estimate:
    estimator.prepare(source, step)
    indices = source.step_indices(step)
    size = len(indices) // parts
    return estimator.estimate([source.batch(indices[i : i + size]) for i in range(0, len(indices), size)], step)


def result(objective: NetworkObjective, estimate: Estimate) -> torch.Tensor:
    return gradient(objective) if estimate.projected is None else estimate.projected.coefficients


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_are_bit_identical_after_an_estimate(name, dtype):
    objective, source = problem(dtype)
    digest = TrainableParameters(objective.module).digest()
    estimator = build(name, objective)
    for step in range(3):
        run(estimator, source, step=step)
        assert TrainableParameters(objective.module).digest() == digest


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("calls", [0, 1, 4, 9])
def test_parameters_are_bit_identical_when_the_loss_raises(name, calls):
    class Failing(NetworkObjective):
        left = calls

        def terms(self, batch) -> LossTerms:
            if self.left == 0:
                raise ArithmeticError
            self.left -= 1
            return super().terms(batch)

    objective = Failing(problem()[0].network)
    digest = TrainableParameters(objective.module).digest()
    estimator, source = build(name, objective), problem()[1]

    def run_steps() -> None:
        for step in range(10):
            run(estimator, source, step=step)

    with pytest.raises(ArithmeticError):
        run_steps()
    assert TrainableParameters(objective.module).digest() == digest


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_partitioning_does_not_change_the_estimate(name, parts, dtype):
    objective, source = problem(dtype)
    whole = run(build(name, objective), source)
    expected = result(objective, whole).double()
    cut = run(build(name, objective), source, parts=parts)
    actual = result(objective, cut).double()
    if dtype == torch.float64:
        tolerance = 1e-10 * expected.norm()
    elif whole.projected is None:
        tolerance = 1e-5 * expected.norm()
    else:
        tolerance = torch.tensor(4 * 2**-23 * float(whole.loss) / 1e-3)
    assert (actual - expected).norm() <= tolerance
    assert cut.loss == pytest.approx(float(whole.loss), rel=1e-6)
    assert cut.work == whole.work


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_estimate_is_a_function_of_the_step_not_of_the_generator(name):
    objective, source = problem(dropout=0.3)
    estimates = []
    for state in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            before = torch.get_rng_state()
            estimates.append(result(objective, run(build(name, objective), source, step=5)).clone())
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*estimates)
    other_step = result(objective, run(build(name, objective), source, step=6))
    assert not torch.equal(other_step, estimates[0])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_restored_estimator_goes_on_as_the_first_one(name):
    objective, source = problem()
    first = build(name, objective)
    run(first, source, step=0)
    second = build(name, objective)
    second.load_state_dict(first.state_dict())
    expected = result(objective, run(first, source, step=1)).clone()
    assert torch.equal(result(objective, run(second, source, step=1)), expected)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_stop_before_any_pass_leaves_a_state_from_which_the_same_follows(name):
    objective, source = problem(torch.float32)
    calls = reached = until = 0
    spent = Work()
    found: dict[int, tuple[torch.Tensor, float]] = {}

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls == until

    def steps(estimator: GradientEstimator) -> None:
        nonlocal reached, spent
        while reached < 2:
            spent += estimator.prepare(source, reached)
            indices = source.step_indices(reached)
            estimate = estimator.estimate([source.batch(indices[:9]), source.batch(indices[9:])], reached)
            spent += estimate.work
            found[reached] = result(objective, estimate).clone(), float(estimate.loss)
            reached += 1

    uninterrupted = build(name, StoppableObjective(objective, stop))
    steps(uninterrupted)
    expected, whole, total = dict(found), spent, calls
    for until in {*range(1, min(3, total)), *range(3, total, 1 + total // 5), total}:
        calls, reached, spent = 0, 0, Work()
        found.clear()
        stopped = build(name, StoppableObjective(objective, stop))
        with pytest.raises(StopRequested):
            steps(stopped)
        resumed = build(name, objective)
        resumed.load_state_dict(stopped.state_dict())
        steps(resumed)
        assert spent == whole, until
        assert str(resumed.state_dict()) == str(uninterrupted.state_dict()), until
        for step, (estimate, loss) in expected.items():
            assert torch.equal(found[step][0], estimate), (until, step)
            assert found[step][1] == loss, (until, step)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_loss_is_the_weighted_mean(name):
    objective, source = problem()
    batch = source.batch(source.step_indices(0))
    objective.module.eval()
    terms = objective.terms(batch)
    expected = (terms.total.sum() / terms.count.sum()).item()
    assert float(run(build(name, objective), source).loss) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_a_zeroth_order_estimate_allocates_no_gradient(name):
    objective, source = problem()
    run(build(name, objective), source)
    assert all(parameter.grad is None for parameter in objective.module.parameters())


def count_samples(objective: NetworkObjective) -> list[int]:
    """Grows by the batch size of every forward pass of the model."""
    seen: list[int] = []
    objective.module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("first_order", 16, 16),
        ("svrg", 32, 32),
        ("spsa_central", 6 * 16, 0),
        ("spsa_forward", 4 * 16, 0),
        ("zosvrg_full_steps", 16, 0),
        ("vamo_table", 16, 16),
        ("vamo_literal", 16 + 4 * 16, 16),
        ("addax", 4 * 5 + 11, 11),  # every third sample is long
    ],
)
def test_work_counts_what_the_model_was_asked_for(name, forward, backward):
    objective, source = problem()
    seen = count_samples(objective)
    estimator = build(name, objective)
    assert estimator.prepare(source, 0).forward_samples == sum(seen)
    seen.clear()
    work = run(estimator, source).work
    assert (work.forward_samples, work.backward_samples) == (forward, backward)
    assert sum(seen) == forward


def test_work_of_a_snapshot_with_a_search_for_eps():
    objective, source = problem()
    seen = count_samples(objective)
    work = build("vamo_auto_eps", objective).prepare(source, 0)
    assert work.forward_samples == sum(seen)
    assert work.backward_samples == 8
