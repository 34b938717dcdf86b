"""A keyed pseudo-random order of any number of things, in constant memory.

A balanced Feistel network over the smallest even number of bits that covers the size, with cycle-walking
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

ROUNDS = 8
MASK_64 = 2**64 - 1
FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# As arrays of no dimension, which numpy uses sooner than its scalars.
MIX = [(np.array(shift, np.uint64), np.array(factor, np.uint64)) for shift, factor in zip((30, 27), FACTORS)]
LAST_SHIFT = np.array(31, np.uint64)
FEW = 8  # up to so many values plain integers are faster than numpy


def _mix(values: np.ndarray) -> None:
    """The finaliser of SplitMix64, in place: every output bit depends on every input bit. (n,) uint64."""
    for shift, factor in MIX:
        values ^= values >> shift
        values *= factor
    values ^= values >> LAST_SHIFT


class Permutation:
    """A pseudo-random permutation of [0, size), the same for the same key on every machine, in O(1) memory."""

    def __init__(self, size: int, key: Sequence[Any]) -> None:
        assert 0 < size < 2**62
        self.size = size
        self.half = max(1, -(-(size - 1).bit_length() // 2))
        self.mask = (1 << self.half) - 1
        digest = hashlib.shake_256(repr(tuple(key)).encode()).digest(8 * ROUNDS)
        self.keys = np.frombuffer(digest, "<u8").tolist()
        self._arrays = [np.array(value, np.uint64) for value in (self.half, self.mask, *self.keys)]

    def __call__(self, indexes: np.ndarray) -> np.ndarray:
        """indexes (n,) in [0, size) -> (n,) uint64, each of [0, size)."""
        values = self._network(np.asarray(indexes, np.uint64))
        while len(outside := np.flatnonzero(values >= self.size)) > FEW:
            values[outside] = self._network(values[outside])
        for place in outside.tolist():
            values[place] = self._walk(int(values[place]))
        return values

    def one(self, index: int) -> int:
        """The image of one index, in plain integers."""
        return self._walk(self._step(index))

    def _walk(self, value: int) -> int:
        while value >= self.size:
            value = self._step(value)
        return value

    def _step(self, value: int) -> int:
        """`_network` of one value."""
        left, right = value >> self.half, value & self.mask
        for key in self.keys:
            mixed = right ^ key
            mixed = (mixed ^ mixed >> 30) * FACTORS[0] & MASK_64
            mixed = (mixed ^ mixed >> 27) * FACTORS[1] & MASK_64
            left, right = right, left ^ (mixed ^ mixed >> 31) & self.mask
        return left << self.half | right

    def _network(self, values: np.ndarray) -> np.ndarray:
        """(n,) uint64 of the network's domain -> (n,) uint64 of it."""
        half, mask, *keys = self._arrays
        left, right = values >> half, values & mask
        for key in keys:
            mixed = right ^ key
            _mix(mixed)
            mixed &= mask
            mixed ^= left
            left, right = right, mixed
        return (left << half) | right
