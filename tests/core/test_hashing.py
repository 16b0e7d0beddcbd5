import pytest
import torch

from vamo_ft.core.hashing import BLOCK, Domain, HashKey, block_words, philox, random_bits

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert philox(counter, key) == expected


def _reference_bits(key: HashKey, offset: int) -> int:
    """The construction of the design in plain integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    block = offset >> 16
    k0, k1, _, _ = philox((block & 0xFFFFFFFF, block >> 32, 0, 0), key.words)
    return mix(mix(((offset & 0xFFFF) + k0) & 0xFFFFFFFF) ^ k1)


@pytest.mark.parametrize("start", [0, BLOCK - 3, 2**32 - 3, 2**32 + 5 * BLOCK - 2, 2**45])
def test_bits_equal_the_definition_on_both_sides_of_every_boundary(start):
    key = HashKey(seed=2**40 + 11, domain=Domain.DIRECTION, step=2**33 + 1, probe=3)
    bits = random_bits(key, start, start + 6, device=CPU)
    assert [int(value) & 0xFFFFFFFF for value in bits] == [_reference_bits(key, start + i) for i in range(6)]


def test_bits_do_not_depend_on_the_range_asked_for():
    key = HashKey(1, Domain.ROUNDING, 0, 0)
    whole = random_bits(key, 0, 3 * BLOCK, device=CPU)
    for start, stop in [(0, 1), (5, BLOCK), (BLOCK - 1, BLOCK + 1), (17, 2 * BLOCK + 9), (2 * BLOCK, 3 * BLOCK)]:
        assert torch.equal(random_bits(key, start, stop, device=CPU), whole[start:stop])


def test_words_of_a_block_do_not_depend_on_how_many_are_asked_for():
    key, first = HashKey(2**40, Domain.DIRECTION, 2**33, 3), 2**32 - 20
    many = block_words(key, first, first + 100)
    for start, count in [(0, 0), (0, 1), (19, 2), (12, 16), (12, 17), (60, 40)]:
        few = block_words(key, first + start, first + start + count)
        assert few.dtype == torch.int32
        assert torch.equal(few, many[start : start + count])


def test_every_part_of_the_key_changes_the_bits():
    key = HashKey(1, Domain.DIRECTION, 2, 3)
    others = [
        key._replace(seed=2),
        key._replace(seed=1 + 2**32),
        key._replace(domain=Domain.ORDER),
        key._replace(step=3),
        key._replace(step=2 + 2**32),
        key._replace(probe=4),
    ]
    first = random_bits(key, 0, 64, device=CPU)
    for other in others:
        assert (random_bits(other, 0, 64, device=CPU) != first).sum() > 60
    assert (random_bits(key, 0, 64, device=CPU, lane=1) != first).sum() > 60
