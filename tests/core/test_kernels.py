import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch._inductor.codecache import PyCodeCache

from tests.toys import normal
from vamo_ft.core import directions, kernels
from vamo_ft.core.directions import HashedDirections
from vamo_ft.core.factored import LowRankDirections
from vamo_ft.core.hashing import Domain, HashKey, random_bits
from vamo_ft.core.kernels import compiler_available
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.rounding import stochastically_rounded

CPU = torch.device("cpu")
ROUNDING = HashKey(3, Domain.ROUNDING, 5, 1)

needs_compiler = pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler here")


def key(probe: int = 0, step: int = 0) -> HashKey:
    return HashKey(3, Domain.DIRECTION, step, probe)


def parameters_of(dtype: torch.dtype) -> TrainableParameters:
    """Large, small and equal sizes, a prime one, a tensor that is not contiguous, and one element."""
    module = nn.Module()
    shapes = [(70_000,), (3, 5), (300, 221), (64,), (64,), (192, 576), (65_537,), (131_071,), (1,)]
    for number, shape in enumerate(shapes):
        value = normal(*shape, seed=number, dtype=dtype)
        module.register_parameter(f"p{number}", nn.Parameter(value.T.contiguous().T if number == 2 else value))
    return TrainableParameters(module)


def moved(
    dtype: torch.dtype,
    *,
    compiled: bool,
    distribution: str = "rademacher",
    num_keys: int = 1,
    out_of_place: bool = False,
) -> Tensor:
    parameters = parameters_of(dtype)
    directions = HashedDirections(parameters, distribution=distribution, compile_kernels=compiled)
    targets = [torch.zeros_like(tensor) for tensor in parameters.tensors] if out_of_place else parameters.tensors
    directions.axpy_(
        targets,
        1e-2 * torch.arange(1, num_keys + 1),
        [key(probe) for probe in range(num_keys)],
        scales=None if out_of_place else [0.999] * len(targets),
        rounding=ROUNDING,
        sources=parameters.tensors if out_of_place else None,
    )
    return torch.cat([target.detach().reshape(-1) for target in targets])


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "distribution", "num_keys", "out_of_place"),
    [
        (torch.float32, "rademacher", 1, True),
        (torch.float32, "gaussian", 1, False),
        (torch.bfloat16, "rademacher", 5, False),
        (torch.bfloat16, "gaussian", 1, True),
        (torch.float16, "rademacher", 1, True),
    ],
)
def test_compiled_kernels_give_the_bits_of_plain_ones(
    dtype: torch.dtype, distribution: str, num_keys: int, out_of_place: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plain, fused = (
        moved(dtype, compiled=compiled, distribution=distribution, num_keys=num_keys, out_of_place=out_of_place)
        for compiled in (False, True)
    )
    assert torch.equal(plain, fused)
    assert "uncompiled" not in caplog.text


@needs_compiler
@pytest.mark.parametrize(("dtype", "distribution"), [(torch.float32, "rademacher"), (torch.bfloat16, "gaussian")])
def test_nothing_is_compiled_again_in_steady_state(dtype: torch.dtype, distribution: str) -> None:
    parameters = parameters_of(dtype)
    directions = HashedDirections(parameters, distribution=distribution, compile_kernels=True)

    def step(number: int) -> None:
        directions.axpy_(
            parameters.tensors,
            torch.tensor([0.1 * number], dtype=torch.float64),
            [key(step=number)],
            scales=[1 - 0.01 * number] * len(parameters.tensors),
            rounding=ROUNDING._replace(step=number),
        )

    step(0)
    counter = torch._dynamo.utils.counters["stats"]
    before = counter["unique_graphs"]
    assert before > 0
    for number in range(1, 6):
        step(number)
    assert counter["unique_graphs"] == before


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled so far counts, nor will what is compiled in the test."""

    def forget() -> None:
        kernels.compiled.cache_clear()
        torch._dynamo.reset()
        PyCodeCache.cache_clear()

    forget()
    yield
    forget()


@needs_compiler
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_random_bits_never_go_through_memory(
    distribution: str, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled kernels allocate nothing of the size of their rows, whatever shapes and strides they met before."""
    taken: list[int] = []
    guards = torch._C._dynamo.guards
    allocate = guards._empty_strided_cpu

    def noted(size: tuple[int, ...], *arguments: object) -> Tensor:
        taken.append(math.prod(size))
        return allocate(size, *arguments)

    monkeypatch.setattr(guards, "_empty_strided_cpu", noted)
    module = nn.ParameterList([nn.Parameter(normal(*shape, seed=1)) for shape in [(512, 576), (1536, 576), (640, 576)]])
    parameters = TrainableParameters(module)
    directions = HashedDirections(parameters, distribution=distribution, compile_kernels=True)
    one = torch.ones(1, dtype=torch.float64)
    tokens = torch.arange(512)
    directions.displaced_rows(
        parameters.tensors[0].detach()[tokens], tokens, index=0, coefficients=one, keys=[key()], rounding=None
    )
    buffer = torch.empty(2_000_000)
    places = [buffer[64 * k : 64 * k + t.numel()].view(t.shape) for k, t in enumerate(parameters.tensors, start=1)]
    directions.axpy_(places, one, [key()], sources=parameters.tensors)
    directions.axpy_(parameters.tensors, one, [key()])
    assert max(taken, default=0) < 10_000


@pytest.mark.parametrize(
    "failure",
    [BackendCompilerFailed(lambda: None, RuntimeError("no such header"), None), FailOnRecompileLimitHit("64 of them")],
)
def test_where_the_compiler_fails_plain_kernels_take_over(
    failure: Exception, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_nothing(kernel: Callable[..., None], **options: object) -> Callable[..., None]:
        def fail(*arguments: object, **keywords: object) -> None:
            raise failure

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    expected = moved(torch.float32, compiled=False)
    monkeypatch.setattr(kernels, "_CHUNK", 200_000)
    largest = 0
    displace = kernels.displace_

    def noted(out: Tensor, *arguments: object, **keywords: object) -> None:
        nonlocal largest
        if len(out) > 1:
            largest = max(largest, out.numel())
        displace(out, *arguments, **keywords)

    monkeypatch.setattr(directions, "displace_", noted)
    assert torch.equal(moved(torch.float32, compiled=True), expected)
    assert caplog.text.count("perturbations stay uncompiled") == 1
    assert 0 < largest <= 200_000, "plain kernels work on a part of the rows at a time"


def test_the_number_of_threads_changes_nothing() -> None:
    results = []
    for count in (2, 1):
        torch.set_num_threads(count)
        parameters = parameters_of(torch.float32)
        directions = HashedDirections(parameters, distribution="gaussian", compile_kernels=False)
        results.append(directions.dots(parameters.tensors, [key(0), key(1)]))
        results.append(moved(torch.bfloat16, compiled=False, distribution="gaussian"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_gaussians_are_box_muller() -> None:
    """Against float64 logarithm, root and cosine of the same uniforms."""
    numel = 200_000
    directions = HashedDirections(TrainableParameters(nn.ParameterList([nn.Parameter(torch.zeros(numel))])))
    directions = HashedDirections(directions._parameters, distribution="gaussian")
    radius, angle = (
        (random_bits(key(), 0, numel, device=CPU, lane=lane) >> 8 & 0xFFFFFF).double() / 2**24 for lane in (0, 1)
    )
    exact = (-2 * (radius + 2**-24).log()).sqrt() * (2 * math.pi * angle).cos()
    assert ((directions.values(key(), 0, numel) - exact).abs() <= 6e-7 * exact.abs()).all()


@pytest.mark.parametrize("beyond", [0, 2**32 - 70_000])
def test_a_tensor_is_displaced_by_the_values_at_its_offset(beyond: int) -> None:
    """Also one that begins below 2**32 and ends above; and one that is neither contiguous nor cut evenly."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(140_003)), nn.Parameter(torch.zeros(257, 263).T)])
    parameters = TrainableParameters(module)
    parameters.offsets = tuple(offset + beyond for offset in parameters.offsets)
    parameters.numel += beyond
    directions = HashedDirections(parameters, compile_kernels=False)
    directions.axpy_(parameters.tensors, torch.ones(1), [key()])
    moved = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors])
    assert torch.equal(moved, directions.values(key(), beyond, beyond + len(moved)))


def test_rows_of_a_matrix_are_displaced_as_the_whole() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parameters = parameters_of(dtype)
        directions = HashedDirections(parameters, distribution="gaussian")
        index = 5
        matrix = parameters.tensors[index].detach()
        whole = [torch.empty_like(matrix)]
        directions.axpy_(whole, torch.tensor([1e-2]), [key()], rounding=ROUNDING, sources=[matrix], indices=[index])
        rows = torch.tensor([191, 0, 7, 7, 100])
        some = directions.displaced_rows(
            matrix[rows], rows, index=index, coefficients=torch.tensor([1e-2]), keys=[key()], rounding=ROUNDING
        )
        assert torch.equal(some, whole[0][rows])


@pytest.mark.parametrize("exponent", [0, -13, -14, -15, -20, -24])
def test_float16_is_rounded_to_neighbours_and_exactly_in_the_mean(exponent: int) -> None:
    """Also among subnormal numbers, below 2**-14."""
    spacing = 2.0 ** max(exponent - 10, -24)
    low = 2.0**exponent
    values = torch.full((100_000,), low + 0.3 * spacing)
    bits = random_bits(ROUNDING, 0, len(values), device=CPU)
    for sign in (1, -1):
        rounded = stochastically_rounded(sign * values, bits, torch.float16).double()
        assert set(rounded.unique().tolist()) == {sign * low, sign * (low + spacing)}
        assert (rounded.abs() > low).double().mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / len(values)))


@needs_compiler
def test_compiled_products_of_factors_give_the_bits_of_plain_ones(caplog: pytest.LogCaptureFixture) -> None:
    """In place, where target and source are one."""
    results = []
    for compiled in (False, True):
        parameters = parameters_of(torch.float32)
        directions = LowRankDirections(parameters, rank=2, refresh_every=5, compile_kernels=compiled)
        directions.axpy_(parameters.tensors, torch.tensor([1e-2]), [key()], rounding=ROUNDING)
        results.append(torch.cat([tensor.detach().reshape(-1) for tensor in parameters.tensors]))
    assert torch.equal(*results)
    assert "uncompiled" not in caplog.text
