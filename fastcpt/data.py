"""Which tokens a training step sees: a pure function of the phases and of a sample counter.

A *sample* is one window of seq_len + 1 tokens of one shard set (`shards.py`). Sample number i of a run is found in
O(sources) without an index and whatever the world size, the micro-batch or the number of resumes:

1. The *phase* that i falls in gives the mixture. Within it, nested two-way quotas share the samples out: at each node
   of a binary tree the left branch has received round(n w) of the first n samples. With two or three sources each is
   within one sample of its exact share at every moment; with any number, within two (1.25 is the worst found).
2. The source's k-th sample is window P_e(k mod W) of its W windows, e = k div W. P_e is a keyed pseudo-random
   permutation of [0, W), one for each epoch: nothing repeats within an epoch.
3. A source that replays what an earlier run read of its set, the first n positions of that run's P_0, gives P_0(k mod n), or
   P_0(Q_e(k mod n)) with a permutation Q_e of [0, n): only windows that were read, each once an epoch.
"""

import bisect
import heapq
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import numpy as np

from fastcpt import UserError
from fastcpt.permutation import FEW, Permutation
from fastcpt.shards import ShardSet, joined

MILLION = 1_000_000
PLACED = 8192  # samples whose places are computed at once: numpy takes ten times as long for them as for ten
AHEAD = 2  # batches that wait for the loop, so that a slow one is no gap


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

    def one(self, index: int) -> tuple[int, int]:
        """`locate` of one sample, in plain integers."""
        node = self._tree
        while not isinstance(node, int):
            weight, left, whole, right = node
            before = (2 * index * weight + whole) // (2 * whole)
            taken = (2 * (index + 1) * weight + whole) // (2 * whole) > before
            node, index = (left, before) if taken else (right, index - before)
        return node, index

    def locate(self, indexes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (n,) int64 below 2^42 -> (the branch of each, its number within the branch), (n,) int64."""
        assert len(indexes) == 0 or (0 <= indexes.min() and indexes.max() < 2**42)  # 2 * 2^42 * MILLION < 2^63
        branches, numbers = np.empty_like(indexes), np.empty_like(indexes)
        stack: list[tuple[Any, np.ndarray, np.ndarray]] = [(self._tree, np.arange(len(indexes)), indexes)]
        while stack:
            node, places, index = stack.pop()
            if isinstance(node, int):
                branches[places], numbers[places] = node, index
            elif len(places):
                weight, left, whole, right = node
                before = (2 * index * weight + whole) // (2 * whole)
                after = (2 * (index + 1) * weight + whole) // (2 * whole)
                taken = after > before
                stack += [(left, places[taken], before[taken]), (right, places[~taken], (index - before)[~taken])]
        return branches, numbers


@dataclass(frozen=True)
class Replay:
    """Windows that are read again: the first `pool` of the first epoch of the order of `seed`, None: of that in which they
    are stored. shuffle: the seed of a new order of them, another in each epoch; None: in the order of then."""

    pool: int
    seed: int | None
    shuffle: int | None


@dataclass(frozen=True)
class PhaseSource:
    """A source within a phase. weight in parts per million; start: samples it gave before the phase."""

    name: str
    fingerprint: str
    weight: int
    start: int
    replay: Replay | None = None

    @property
    def key(self) -> str:
        """What its samples are counted under: its content, and apart from new text what it replays."""
        again = self.replay
        return self.fingerprint if again is None else f"{self.fingerprint} {again.pool} {again.seed} {again.shuffle}"

    def epoch(self, windows: int) -> int:
        """Samples until one is read again, of a set of so many windows."""
        return windows if self.replay is None else self.replay.pool

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "PhaseSource":
        return cls(**value | {"replay": Replay(**value["replay"]) if value.get("replay") else None})


@dataclass(frozen=True)
class Phase:
    """A mixture that holds from sample number `first` on."""

    first: int
    sources: tuple[PhaseSource, ...]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Phase":
        return cls(value["first"], tuple(PhaseSource.from_dict(source) for source in value["sources"]))


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
            "weight-too-small",
            f"data.train: weight {weights[parts.index(0)]} is below a millionth of the mixture; raise or remove it",
        )
    return parts


def taken(phases: Sequence[Phase], samples: int) -> dict[str, int]:
    """Samples that each source, by its key, has given before sample number `samples`."""
    seen: dict[str, int] = {}
    ends = [phase.first for phase in phases[1:]] + [samples]
    for phase, end in zip(phases, ends):
        if phase.first <= samples:
            counts = Quotas([source.weight for source in phase.sources]).counts(min(end, samples) - phase.first)
            seen |= {source.key: source.start + count for source, count in zip(phase.sources, counts)}
    return seen


class Mixture:
    """Training samples by number.

    sets: {name: ShardSet}, all of one dtype. phases: in order, the first with first=0. seed: the order's key.
    """

    def __init__(self, sets: dict[str, ShardSet], phases: Sequence[Phase], seq_len: int, seed: int) -> None:
        self.sets, self.phases, self.seq_len, self.seed = sets, list(phases), seq_len, seed
        assert self.phases and self.phases[0].first == 0
        self._quotas = [Quotas([source.weight for source in phase.sources]) for phase in self.phases]
        self._permutations: dict[tuple[Any, ...], Permutation] = {}
        self._firsts = [phase.first for phase in self.phases]
        self._placed = lru_cache(8)(self._place)  # the thread that reads is ahead of the one that trains
        self._last = -PLACED  # where the last request started
        for phase in self.phases:
            content = [source.fingerprint for source in phase.sources]
            if len(set(content)) < len(content):
                raise UserError(
                    "shards-twice",
                    f"data.train: {[s.name for s in phase.sources]} hold the same set twice; add up their weights",
                )
        dtypes = {shard_set.dtype for shard_set in sets.values()}
        if len(dtypes) > 1:
            raise UserError(
                "shards-of-different-types",
                f"data.train: the sets {list(sets)} hold ids of different types {sorted(map(str, dtypes))}",
            )
        for shard_set in sets.values():
            if shard_set.num_windows(seq_len) == 0:
                raise UserError(
                    "shards-too-short",
                    f"{shard_set.path}: {len(shard_set):,} tokens, fewer than one sequence of {seq_len} + 1; lower the length, or give a larger set",
                )

    def _place(self, phase: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [start, start + count) of a phase, as if it never ended -> what `_places` returns of them."""
        sources, quotas, names = self.phases[phase].sources, self._quotas[phase], list(self.sets)
        sizes = [self.sets[source.name].num_windows(self.seq_len) for source in sources]
        numbers, windows = np.empty(count, np.int64), np.empty(count, np.int64)
        if count <= FEW:
            for place in range(count):
                branch, index = quotas.one(start + place)
                source, size = sources[branch], sizes[branch]
                epoch, position = divmod(source.start + index, source.epoch(size))
                for permutation in self._order(source, epoch, size):
                    position = permutation.one(position)
                numbers[place], windows[place] = names.index(source.name), position
            return numbers, windows
        branches, indexes = quotas.locate(np.arange(start, start + count))
        for branch, (source, size) in enumerate(zip(sources, sizes)):
            own = np.flatnonzero(branches == branch)
            numbers[own] = names.index(source.name)
            epochs, positions = np.divmod(source.start + indexes[own], source.epoch(size))
            for epoch in set(epochs.tolist()):
                now = epochs == epoch
                part = positions[now]
                for permutation in self._order(source, epoch, size):
                    part = permutation(part)
                windows[own[now]] = part
        return numbers, windows

    def _places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [first, first + count) -> (place of each one's source in `sets`, its window), (count,) int64."""
        # Who reads on, alone or as one of several processes, is given of a block; who seeks waits for what he asks alone.
        reads_on = abs(first - self._last) < PLACED
        self._last = first
        parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        while count:
            phase = bisect.bisect_right(self._firsts, first) - 1
            start = first - self._firsts[phase]
            end = self._firsts[phase + 1] if phase + 1 < len(self._firsts) else first + count
            taken, skipped = min(count, end - first), 0
            if reads_on:
                skipped = start % PLACED
                taken = min(taken, PLACED - skipped)
            numbers, windows = self._placed(phase, start - skipped, PLACED if reads_on else taken)
            parts.append((numbers[skipped : skipped + taken], windows[skipped : skipped + taken]))
            first, count = first + taken, count - taken
        if len(parts) == 2:
            return parts[1]
        return np.concatenate([numbers for numbers, _ in parts]), np.concatenate([windows for _, windows in parts])

    def locate(self, first: int, count: int) -> list[tuple[str, int]]:
        """Samples [first, first + count) -> (source, window of its shard set) of each."""
        names = list(self.sets)
        numbers, windows = self._places(first, count)
        return [(names[number], window) for number, window in zip(numbers.tolist(), windows.tolist())]

    def source_numbers(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) -> (count,) int64, the place of each one's source in `sets`."""
        return self._places(first, count)[0].copy()

    def _order(self, source: PhaseSource, epoch: int, size: int) -> list[Permutation]:
        """The permutations that lead, one after another, from a position in an epoch to a window."""
        # Keyed by content, not by name or place: a renamed source goes on where it was.
        content, again = source.fingerprint, source.replay
        if again is None:
            return [self._permutation(size, self.seed, self.seq_len, content, epoch)]
        new = [] if again.shuffle is None else [(again.pool, again.shuffle, self.seq_len, "replay", content, epoch)]
        then = [] if again.seed is None else [(size, again.seed, self.seq_len, content, 0)]
        return [self._permutation(*key) for key in new + then]

    def _permutation(self, size: int, *key: Any) -> Permutation:
        if (size, *key) not in self._permutations:
            self._permutations[size, *key] = Permutation(size, key)
        return self._permutations[size, *key]

    def windows(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) -> tokens (count, seq_len + 1), uint16 or int32."""
        numbers, windows = self._places(first, count)
        pieces: list[bytes | memoryview] = [b""] * count
        for number, shard_set in enumerate(self.sets.values()):
            rows = np.flatnonzero(numbers == number)
            if len(rows):
                for row, piece in zip(rows.tolist(), shard_set.pieces(windows[rows], self.seq_len)):
                    pieces[row] = piece
        return joined(pieces, self.seq_len, next(iter(self.sets.values())).dtype)

    def seen(self, samples: int) -> dict[str, int]:
        """`taken` of the mixture's phases."""
        return taken(self.phases, samples)


def evaluation_windows(shard_set: ShardSet, seq_len: int, tokens: int) -> np.ndarray:
    """The fixed windows of a validation set: `tokens` rounded up to whole windows, or all that there are.

    They depend on the set alone, spread over all of it, so that runs with other seeds are compared on the same text.
    """
    size = shard_set.num_windows(seq_len)
    if size == 0:
        raise UserError(
            "shards-too-short",
            f"{shard_set.path}: {len(shard_set):,} tokens, fewer than one sequence of {seq_len} + 1; lower the length, or give a larger set",
        )
    count = min(size, -(-tokens // seq_len))
    return np.sort(Permutation(size, ("evaluation", shard_set.fingerprint))(np.arange(count)))


def batches(
    mixture: Mixture,
    first: int,
    steps: int,
    batch: int,
    rank: int,
    world: int,
    ready: Callable[[np.ndarray], Any] = lambda windows: windows,
) -> Iterator[Any]:
    """This process's windows for each of `steps` steps from sample `first` on, read AHEAD steps ahead on a thread.

    A step takes the next `batch` samples; process r of W takes the part [r batch / W, (r + 1) batch / W) of them, so
    what a step sees does not depend on W. ready: what the thread makes of the windows, (n, seq_len + 1), at the end.
    """
    low, high = rank * batch // world, (rank + 1) * batch // world
    # Not an executor: what it does for each call would take several times as long as fetching what lies ready.
    asked: SimpleQueue[int | None] = SimpleQueue()
    read: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def serve() -> None:
        while (step := asked.get()) is not None:
            try:
                read.put((ready(mixture.windows(first + step * batch + low, high - low)), None))
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised in the loop
                read.put((None, error))

    # A daemon: a loop that ends with an error may never close this generator, and the process must end all the same.
    reader = threading.Thread(target=serve, name="data", daemon=True)
    reader.start()
    try:
        for step in range(min(AHEAD, steps)):
            asked.put(step)
        for step in range(steps):
            windows, error = read.get()
            if error is not None:
                raise error
            if step + AHEAD < steps:
                asked.put(step + AHEAD)
            yield windows
    finally:
        asked.put(None)
        reader.join()
