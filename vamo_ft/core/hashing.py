"""Counter-based random bits: a pure function of a key and an element's 64-bit offset.

There is no generator state. The bits of an element do not depend on chunking, thread count, device or on which other
elements are asked for. A key goes through Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) to two words, and with them `offset >> 16` once per block of 65,536 elements to the block's
words (K0, K1). Within the block an element is `mix(mix((offset & 0xffff) + K0) ^ K1)`.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "Domain", "HashKey", "philox", "random_bits"]

BLOCK = 1 << 16
"""Elements that share one pair of block words."""

_MASK = 0xFFFFFFFF


class Domain(IntEnum):
    """What random bits are for; equal numbers in two domains give unrelated bits."""

    DIRECTION = 1
    ROUNDING = 2
    ORDER = 3
    DROPOUT = 4
    SUBSET = 5


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


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds, on 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_bits(key: HashKey, start: int, stop: int, *, device: torch.device, lane: int = 0) -> Tensor:
    """32 random bits for each offset in [start, stop).

    Args:
        lane: 0 or 1, two independent streams of the same key.

    Returns:
        (stop - start,) int32 on `device`.
    """
    first, last = start // BLOCK, -(-stop // BLOCK)
    key_words = key.words
    block_words = [
        philox((block & _MASK, block >> 32, 0, 0), key_words)[2 * lane : 2 * lane + 2] for block in range(first, last)
    ]
    k0, k1 = torch.tensor(block_words, dtype=torch.int64, device=device).to(torch.int32).unsqueeze(2).unbind(1)
    low, high = (start % BLOCK, start % BLOCK + stop - start) if last - first == 1 else (0, BLOCK)
    element = torch.arange(low, high, dtype=torch.int32, device=device)
    bits = _mix_(_mix_(element + k0).bitwise_xor_(k1)).flatten()  # (blocks * columns,)
    skipped = start - (first * BLOCK + low)
    return bits[skipped : skipped + stop - start]


def _mix_(x: Tensor) -> Tensor:
    """A bijection of 32 bits with little bias, in place (two multiplications; constants found by C. Wellons, 2018)."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
