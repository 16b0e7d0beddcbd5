import pytest
import torch
from torch import nn

from tests.memories import two_memories
from tests.toys import normal
from vamo_ft.core.gradient_subspace import GradientSubspace
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.offload import Shelf, shelved
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.perturbation import placed_at

CPU = torch.device("cpu")
KEYS = [HashKey(1, Domain.DIRECTION, 4, probe) for probe in range(3)]


def trained() -> TrainableParameters:
    shapes = [(5, 6), (7,), (4, 3)]
    module = nn.ParameterList([nn.Parameter(normal(*s, seed=n, dtype=torch.float32)) for n, s in enumerate(shapes)])
    return TrainableParameters(module)


def test_what_is_lent_is_a_copy_that_has_to_be_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_memories(monkeypatch) as memories:
        shelf = Shelf([torch.zeros(2, 3), torch.ones(4)], device=CPU, offload=True)
        borrowed = shelf[0]
        borrowed += 5
        assert not shelf[0].any()
        shelf[0] = borrowed
        assert bool((shelf[0] == 5).all())
        shelf.write(0, 1, torch.full((3,), 7.0))
        assert shelf.state()[0].tolist() == [[5.0] * 3, [7.0] * 3]
        assert [tensor.tolist() for tensor in shelf[1:]] == [[1.0] * 4]
        assert shelf.part([1])[0].tolist() == [1.0] * 4
        del borrowed
        assert (memories.lent, memories.largest) == (0, 24)


def test_without_offload_a_shelf_holds_the_tensors_themselves() -> None:
    tensor, other = torch.zeros(3), torch.ones(3)
    shelf = Shelf([tensor], device=CPU, offload=False)
    assert shelf[0] is tensor
    shelf[0] = other
    assert shelf[0] is other
    assert not tensor.any()


def test_a_generator_has_one_tensor_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_memories(monkeypatch) as memories:
        first = Shelf((torch.full((100,), float(n)) for n in range(5)), device=CPU, offload=True)
        second = first.like(tensor * 2 for tensor in first)
        assert [float(tensor[0]) for tensor in second] == [0.0, 2.0, 4.0, 6.0, 8.0]
        assert memories.most <= 2 * 400  # the one that a loop still holds, and the next


def test_parameters_wait_beside_the_values_that_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = trained()
    before = parameters.copy()
    with two_memories(monkeypatch) as memories:
        base = shelved(parameters, offload=True)
        with torch.no_grad():
            for tensor in parameters.tensors:
                tensor += 1
        moved = parameters.copy()
        with placed_at(parameters, base):
            assert all(torch.equal(a, b) for a, b in zip(parameters.tensors, before, strict=True))
            assert (memories.lent, memories.kept) == (0, 2 * 4 * parameters.numel)
        assert memories.kept == 4 * parameters.numel
    assert all(torch.equal(a, b) for a, b in zip(parameters.tensors, moved, strict=True))


def test_an_offloaded_sketch_and_basis_are_the_same_bits_and_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(*, offload: bool) -> list[torch.Tensor]:
        parameters = trained()
        directions = GradientSubspace(parameters, size=3, warmup=4, offload=offload)
        found = []
        for step in range(18):  # the sketch is shrunk twice
            gradients = [
                normal(*p.shape, seed=10 * step + n, dtype=torch.float32) for n, p in enumerate(parameters.tensors)
            ]
            directions.observe(gradients)
            if step in (5, 11):
                directions.freeze()
            if step == 12:
                state = directions.state_dict()
                directions = GradientSubspace(parameters, size=3, warmup=4, offload=offload)
                directions.load_state_dict(state)
            if step > 5:
                directions.axpy_(parameters.tensors, torch.tensor([0.5, -1.0, 2.0]), KEYS)
                found += [directions.dots([*gradients[:2], None], KEYS), directions.gram(KEYS)]
        return [*found, *(tensor.detach() for tensor in parameters.tensors)]

    plain = used(offload=False)
    with two_memories(monkeypatch) as memories:
        offloaded = used(offload=True)
        assert memories.lent == 0
        assert memories.largest == 6 * 30 * 4, "the rows of the largest tensor"
        assert memories.most == 2 * 6 * (30 + 7) * 4, "rows times rows: of a tensor, and of its neighbour"
    assert len(plain) == len(offloaded)
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
