"""Which tokens a training step sees: a pure function of the phases and of a sample counter.

A *sample* is one window of seq_len + 1 tokens of one shard set (`shards.py`). Sample number i of a run is found in
O(sources) without an index and whatever the world size, the micro-batch or the number of resumes:

1. The *phase* that i falls in gives the mixture. Within it, nested two-way quotas share the samples out: at each node
   of a binary tree the left branch has received round(n w) of the first n samples. With two or three sources each is
   within one sample of its exact share at every moment; with any number, within two (1.25 is the worst found).
2. The source's k-th sample is window P_e(k mod W) of its W windows, e = k div W. P_e is a keyed pseudo-random
   permutation of [0, W), one for each epoch: nothing repeats within an epoch.

The permutation is a balanced Feistel network over the smallest even number of bits that covers W, with cycle-walking
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcpt import UserError
from fastcpt.shards import ShardSet

MILLION = 1_000_000
ROUNDS = 8


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every output bit depends on every input bit. (n,) uint64 -> (n,) uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A pseudo-random permutation of [0, size), the same for the same key on every machine, in O(1) memory."""

    def __init__(self, size: int, key: Sequence[Any]) -> None:
        assert 0 < size < 2**62
        self.size = size
        self._half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.shake_256(repr(tuple(key)).encode()).digest(8 * ROUNDS)
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, indexes: np.ndarray) -> np.ndarray:
        """indexes (n,) in [0, size) -> (n,) uint64, each of [0, size)."""
        values = self._feistel(np.asarray(indexes, np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._feistel(values[outside])
        return values

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


class Quotas:
    """Shares a counter out among weighted branches, keeping each near its exact share at every moment.

    A node of weight w below a parent of weight W deviates by at most 1/2 + (w / W) times its parent's deviation. In
    Huffman's tree an inner node weighs at most 2/3 of its parent, so the deviations sum to less than 1/2 + 3/2.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        heap: list[tuple[int, int, Any]] = [(weight, branch, branch) for branch, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (light[0] + heavy[0], light[1], (light[0], light[2], light[0] + heavy[0], heavy[2])))
        self._tree = heap[0][2]
        self._count = len(weights)

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` samples each branch receives."""
        counts = [0] * self._count
        stack: list[tuple[Any, int]] = [(self._tree, total)]
        while stack:
            node, number = stack.pop()
            if isinstance(node, int):
                counts[node] = number
                continue
            weight, left, whole, right = node
            taken = (2 * number * weight + whole) // (2 * whole)
            stack += [(left, taken), (right, number - taken)]
        return counts

    def locate(self, index: int) -> tuple[int, int]:
        """Sample number `index` -> (branch, its number within the branch)."""
        node = self._tree
        while not isinstance(node, int):
            weight, left, whole, right = node
            before = (2 * index * weight + whole) // (2 * whole)
            after = (2 * (index + 1) * weight + whole) // (2 * whole)
            node, index = (left, before) if after > before else (right, index - before)
        return node, index


@dataclass(frozen=True)
class PhaseSource:
    """A source within a phase. weight in parts per million; start: samples it gave before the phase."""

    name: str
    fingerprint: str
    weight: int
    start: int


@dataclass(frozen=True)
class Phase:
    """A mixture that holds from sample number `first` on."""

    first: int
    sources: tuple[PhaseSource, ...]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Phase":
        return cls(value["first"], tuple(PhaseSource(**source) for source in value["sources"]))


def parts_per_million(weights: Sequence[float]) -> list[int]:
    """Relative weights -> integers that sum to one million (largest remainders). Raises UserError if one becomes 0."""
    total = sum(weights)
    exact = [weight / total * MILLION for weight in weights]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: MILLION - sum(parts)]:
        parts[i] += 1
    if 0 in parts:
        raise UserError(
            f"data.train: weight {weights[parts.index(0)]} is below a millionth of the mixture; raise or remove it"
        )
    return parts


class Mixture:
    """Training samples by number.

    sets: {name: ShardSet}, all of one dtype. phases: in order, the first with first=0. seed: the order's key.
    """

    def __init__(self, sets: dict[str, ShardSet], phases: Sequence[Phase], seq_len: int, seed: int) -> None:
        self.sets, self.phases, self.seq_len, self.seed = sets, list(phases), seq_len, seed
        assert self.phases and self.phases[0].first == 0
        self._quotas = [Quotas([source.weight for source in phase.sources]) for phase in self.phases]
        self._permutations: dict[tuple[str, int], Permutation] = {}
        for phase in self.phases:
            content = [source.fingerprint for source in phase.sources]
            if len(set(content)) < len(content):
                raise UserError(
                    f"data.train: {[s.name for s in phase.sources]} hold the same set twice; add up their weights"
                )
        dtypes = {shard_set.dtype for shard_set in sets.values()}
        if len(dtypes) > 1:
            raise UserError(f"data.train: the sets {list(sets)} hold ids of different types {sorted(map(str, dtypes))}")
        for shard_set in sets.values():
            if shard_set.num_windows(seq_len) == 0:
                raise UserError(
                    f"{shard_set.path}: {len(shard_set):,} tokens, fewer than one sequence of {seq_len} + 1"
                )

    def _phase(self, sample: int) -> int:
        return max(number for number, phase in enumerate(self.phases) if phase.first <= sample)

    def locate(self, first: int, count: int) -> list[tuple[str, int]]:
        """Samples [first, first + count) -> (source, window of its shard set) of each."""
        places: list[tuple[str, int]] = [("", 0)] * count
        groups: dict[tuple[PhaseSource, int], list[tuple[int, int]]] = {}
        for row in range(count):
            number = self._phase(first + row)
            branch, index = self._quotas[number].locate(first + row - self.phases[number].first)
            source = self.phases[number].sources[branch]
            epoch, index = divmod(source.start + index, self.sets[source.name].num_windows(self.seq_len))
            groups.setdefault((source, epoch), []).append((row, index))
        for (source, epoch), members in groups.items():
            permutation = self._permutation(source, epoch, self.sets[source.name].num_windows(self.seq_len))
            for (row, _), window in zip(members, permutation(np.array([index for _, index in members]))):
                places[row] = (source.name, int(window))
        return places

    def source_numbers(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) -> (count,) int64, the place of each one's source in `sets`."""
        numbers = {name: number for number, name in enumerate(self.sets)}
        out = np.empty(count, np.int64)
        for row in range(count):
            phase = self._phase(first + row)
            branch, _ = self._quotas[phase].locate(first + row - self.phases[phase].first)
            out[row] = numbers[self.phases[phase].sources[branch].name]
        return out

    def _permutation(self, source: PhaseSource, epoch: int, size: int) -> Permutation:
        # Keyed by content, not by name or place: a renamed source goes on where it was.
        key = (source.fingerprint, epoch)
        if key not in self._permutations:
            self._permutations[key] = Permutation(size, (self.seed, self.seq_len, *key))
        return self._permutations[key]

    def windows(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) -> tokens (count, seq_len + 1), uint16 or int32."""
        places = self.locate(first, count)
        out = np.empty((count, self.seq_len + 1), next(iter(self.sets.values())).dtype)
        for name in {name for name, _ in places}:
            rows = [row for row, place in enumerate(places) if place[0] == name]
            out[rows] = self.sets[name].windows(np.array([places[row][1] for row in rows]), self.seq_len)
        return out

    def seen(self, samples: int) -> dict[str, int]:
        """Samples that each source, by fingerprint, has given before sample number `samples`."""
        seen: dict[str, int] = {}
        ends = [phase.first for phase in self.phases[1:]] + [samples]
        for phase, quotas, end in zip(self.phases, self._quotas, ends):
            if phase.first <= samples:
                counts = quotas.counts(min(end, samples) - phase.first)
                seen |= {source.fingerprint: source.start + count for source, count in zip(phase.sources, counts)}
        return seen


def evaluation_windows(shard_set: ShardSet, seq_len: int, tokens: int) -> np.ndarray:
    """The fixed windows of a validation set: `tokens` rounded up to whole windows, or all that there are.

    They depend on the set alone, spread over all of it, so that runs with other seeds are compared on the same text.
    """
    size = shard_set.num_windows(seq_len)
    if size == 0:
        raise UserError(f"{shard_set.path}: {len(shard_set):,} tokens, fewer than one sequence of {seq_len} + 1")
    count = min(size, -(-tokens // seq_len))
    return np.sort(Permutation(size, ("evaluation", shard_set.fingerprint))(np.arange(count)))


def batches(mixture: Mixture, first: int, steps: int, batch: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """This process's windows for each of `steps` steps from sample `first` on, read one step ahead on a thread.

    A step takes the next `batch` samples; process r of W takes the part [r batch / W, (r + 1) batch / W) of them, so
    what a step sees does not depend on W.
    """
    low, high = rank * batch // world, (rank + 1) * batch // world
    with ThreadPoolExecutor(1, thread_name_prefix="data") as reader:
        ahead = reader.submit(mixture.windows, first + low, high - low) if steps else None
        for step in range(1, steps + 1):
            assert ahead is not None
            current = ahead.result()
            if step < steps:
                ahead = reader.submit(mixture.windows, first + step * batch + low, high - low)
            yield current
