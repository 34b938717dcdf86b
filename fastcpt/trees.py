"""Sums in a fixed order, so that they are the same bits however the addends are shared out over processes.

The order is a binary tree over the addends' numbers: the first half is added to the second, element by element, until
one is left; an odd number of them is added up in turn. With a power of two of processes, process r holding the r-th
stretch of addends, the first levels are sums over processes and the others are each process's own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def tree_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    rest = list(tensors)
    while len(rest) % 2 == 0:
        half = len(rest) // 2
        rest = [first + second for first, second in zip(rest[:half], rest[half:])]
    total = rest[0]
    for each in rest[1:]:
        total = total + each
    return total


def _halvings(count: int) -> int:
    """How often a number can be halved."""
    return (count & -count).bit_length() - 1


def order(count: int) -> list[int]:
    """The numbers of `count` addends in the order in which `Tree` wants them: neighbours are added first."""
    levels = _halvings(count)
    odd = count >> levels
    reversed_ = [int(f"{number:0{levels}b}"[::-1], 2) if levels else 0 for number in range(1 << levels)]
    return [first + odd * number for first in range(odd) for number in reversed_]


class Tree:
    """`tree_sum` of lists of tensors that come one after another, in `order(count)`, of which only the logarithm are
    kept. Adds in place, to the tensors that it is given."""

    def __init__(self, count: int) -> None:
        self._whole = 1 << _halvings(count)
        self._waiting: list[tuple[int, list[Tensor]]] = []  # (addends, their sums)

    def add(self, tensors: list[Tensor]) -> None:
        entry = (1, tensors)
        while self._waiting and self._waiting[-1][0] == entry[0] < self._whole:
            size, first = self._waiting.pop()
            entry = (2 * size, _added(first, entry[1]))
        self._waiting.append(entry)
        if len(self._waiting) == 2 and self._waiting[0][0] >= self._whole == self._waiting[1][0]:
            (size, total), (more, each) = self._waiting
            self._waiting = [(size + more, _added(total, each))]

    @property
    def sums(self) -> list[Tensor]:
        ((_, total),) = self._waiting
        return total


def _added(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(first, second)
    return first
