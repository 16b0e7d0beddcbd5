"""Counter-based random bits: a pure function of a key and an element's 64-bit offset.

There is no generator state. The bits of an element do not depend on chunking, thread count, device or on which other
elements are asked for. A key goes through Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) to two words, and with them `offset >> 16` once per block of 65,536 elements to the block's
words (K0, K1). Within the block an element is `mix(mix((offset & 0xffff) + K0) ^ K1)`.
"""

from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vamo_ft.core.transfer import to_device

__all__ = [
    "BLOCK",
    "Domain",
    "HashKey",
    "block_words",
    "direction_keys",
    "hashed",
    "permutation",
    "philox",
    "random_bits",
]

Word = TypeVar("Word", int, Tensor)

BLOCK = 1 << 16
"""Elements that share one pair of block words."""

_FEW_BLOCKS = 16  # for no more, Python's integers are faster than the calls of torch
_MASK = 0xFFFFFFFF


class Domain(IntEnum):
    """What random bits are for; equal numbers in two domains give unrelated bits."""

    DIRECTION = 1
    ROUNDING = 2
    ORDER = 3
    DROPOUT = 4
    SUBSET = 5
    BLOCK_ORDER = 6
    FACTOR = 7
    PROBLEM = 8
    DIAGNOSIS = 9
    SAMPLE = 12
    SHOTS = 13
    PART = 16


class HashKey(NamedTuple):
    """Names one stream of random bits: the run's seed (63 bits), a domain, a step (64 bits) and a probe (32 bits)."""

    seed: int
    domain: Domain
    step: int
    probe: int

    @property
    def words(self) -> tuple[int, int]:
        """Two 32-bit words that stand for the key."""
        counter = (self.probe & _MASK, self.step & _MASK, self.step >> 32 & _MASK, int(self.domain))
        first, second, _, _ = philox(counter, (self.seed & _MASK, self.seed >> 32 & _MASK))
        return first, second


def direction_keys(seed: int, step: int, count: int, *, first: int = 0) -> tuple[HashKey, ...]:
    """The keys of a step's directions number `first` to `first + count - 1`."""
    return tuple(HashKey(seed, Domain.DIRECTION, step, probe) for probe in range(first, first + count))


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32 with ten rounds, on 32-bit words held in Python integers or int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits; a tensor's sign is masked away below
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32 & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def block_words(key: HashKey, first: int, last: int) -> Tensor:
    """(last - first, 4) int32 on the host: K0 and K1 of the two lanes for each block of 65,536 offsets."""
    words = key.words
    if last - first <= _FEW_BLOCKS:
        rows = [philox((block & _MASK, block >> 32, 0, 0), words) for block in range(first, last)]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(torch.int32)
    block = torch.arange(first, last)
    zero = torch.zeros_like(block)
    return torch.stack(philox((block & _MASK, block >> 32, zero, zero), words), dim=1).to(torch.int32)


def hashed(element: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """32 bits for each element, `mix(mix(element + k0) ^ k1)`, int32; the arguments broadcast."""
    return _mix(_mix(element + k0) ^ k1)


def random_bits(key: HashKey, start: int, stop: int, *, device: torch.device, lane: int = 0) -> Tensor:
    """32 random bits for each offset in [start, stop).

    Args:
        lane: 0 or 1, two independent streams of the same key.

    Returns:
        (stop - start,) int32 on `device`.
    """
    first, last = start // BLOCK, -(-stop // BLOCK)
    words = to_device(block_words(key, first, last)[:, 2 * lane : 2 * lane + 2], device)
    low, high = (start % BLOCK, start % BLOCK + stop - start) if last - first == 1 else (0, BLOCK)
    element = torch.arange(low, high, dtype=torch.int32, device=device)
    bits = hashed(element, words[:, :1], words[:, 1:]).flatten()  # (blocks * columns,)
    skipped = start - (first * BLOCK + low)
    return bits[skipped : skipped + stop - start]


def permutation(size: int, key: HashKey) -> Tensor:
    """(size,) int64: the numbers below `size` sorted by the random bits of `key`, equal bits in their own order."""
    return torch.argsort(random_bits(key, 0, size, device=torch.device("cpu")), stable=True)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits with little bias (two multiplications; constants found by C. Wellons, 2018)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)
