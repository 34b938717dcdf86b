"""Parts -> pairs: where a set's documents are cut, and who writes which bytes.

A pair on this machine is written in stretches, by many workers at once and while others still tokenize; a part all of whose
tokens are in pairs makes room. On a remote store, where nothing can be written in pieces, a pair is written by one worker
when all that goes into it is there.
"""

import collections
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcpt.data_prep import store
from fastcpt.data_prep.parts import Job, Places, building_folder, note_moved, refuse_existing, whole_documents
from fastcpt.integrity import block_hash, sync_directory
from fastcpt.shards import BLOCK_BYTES, PairWriter, finish_pair

STRETCH_TOKENS = 16 << 20  # whole blocks of any dtype
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """Documents [documents[0], documents[1]) of a part, which are its tokens [tokens[0], tokens[1]). part: its file of
    tokens, a path or URL."""

    part: str
    documents: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """One pair to write: `spans` one after another. record: where it is noted that this has been done."""

    folder: str
    index: int
    dtype: str
    spans: tuple[Span, ...]
    record: str

    @property
    def name(self) -> str:
        return f"shard-{self.index:05d}"

    @property
    def bytes(self) -> int:
        return sum(span.tokens[1] - span.tokens[0] for span in self.spans) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Stretch:
    """The bytes of a pair's `.bin` from `offset` on: tokens [start, stop) of parts, one after another."""

    folder: str
    index: int
    dtype: str
    offset: int
    tokens: tuple[tuple[str, int, int], ...]

    @property
    def path(self) -> Path:
        return Path(self.folder) / f"shard-{self.index:05d}.bin"

    @property
    def bytes(self) -> int:
        return sum(stop - start for _, start, stop in self.tokens) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Ending:
    """What is left to do of a pair whose `.bin` is written. hashes: of its blocks."""

    pair: Pair
    hashes: bytes


def _lengths(part: str) -> np.ndarray:
    with store.fetched(part.removesuffix(".tokens") + ".lengths") as local:
        return np.fromfile(local, "<i4")


def _pair_lengths(pair: Pair) -> np.ndarray:
    lengths = [_lengths(span.part)[slice(*span.documents)] for span in pair.spans]
    return np.concatenate(lengths) if lengths else np.empty(0, "<i4")


def write(task: Stretch | Ending | Pair) -> tuple[Stretch | Pair, Any]:
    """A task for an engine, as `Pairs.ready` holds them. Returns what `Pairs.done` wants."""
    if isinstance(task, Stretch):
        return task, write_stretch(task)
    if isinstance(task, Ending):
        return task.pair, end_pair(task)
    return task, write_pair(task)


def write_stretch(stretch: Stretch) -> bytes:
    """Returns the hashes of its blocks. Whoever writes it, and how often, writes the same bytes at the same place."""
    os.makedirs(stretch.folder, exist_ok=True)
    size = np.dtype(stretch.dtype).itemsize
    block = bytearray(COPY_BYTES)  # whole blocks, few enough to stay in the processor's cache
    hashes: list[int] = []
    filled, at = 0, stretch.offset
    descriptor = os.open(stretch.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def flush() -> None:
        nonlocal filled, at
        view = memoryview(block)[:filled]
        hashes.extend(block_hash(view[start : start + BLOCK_BYTES]) for start in range(0, filled, BLOCK_BYTES))
        while filled:
            written = os.pwrite(descriptor, view[-filled:], at)
            at, filled = at + written, filled - written

    try:
        for part, start, stop in stretch.tokens:
            with open(part, "rb", buffering=0) as file:
                file.seek(start * size)
                left = (stop - start) * size
                while left:
                    count = file.readinto(memoryview(block)[filled : min(COPY_BYTES, filled + left)])
                    assert count, part
                    left, filled = left - count, filled + count
                    if filled == COPY_BYTES:
                        flush()
        flush()
        # The disk begins to write these bytes, so that it has little left to do at the end, and the memory of those that it
        # has written is there for the next ones: memory that nobody has used lately can cost more than all else here.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return np.array(hashes, "<u8").tobytes()


def end_pair(ending: Ending) -> dict[str, Any]:
    """Makes the `.bin` durable, writes what belongs to it, and notes that the pair is done. Returns its entry."""
    pair, lengths, dtype = ending.pair, _pair_lengths(ending.pair), np.dtype(ending.pair.dtype)
    folder = Path(pair.folder)
    with open(folder / f"{pair.name}.bin", "r+b") as file:
        file.truncate(int(lengths.sum(dtype=np.int64)) * dtype.itemsize)  # another run may have been here
        os.fsync(file.fileno())
    entry = finish_pair(folder, pair.name, dtype, lengths, np.frombuffer(ending.hashes, "<u8"))
    sync_directory(folder)
    store.write_bytes(pair.record, json.dumps(entry).encode(), durable=True)
    return entry


def write_pair(pair: Pair) -> dict[str, Any]:
    """Copies a pair's spans to a remote store. Returns its entry."""
    dtype, lengths = np.dtype(pair.dtype), _pair_lengths(pair)
    with store.staged_files(pair.folder) as local:
        writer = PairWriter(local, pair.name, dtype)
        done = 0
        for span in pair.spans:
            count = span.documents[1] - span.documents[0]
            own = lengths[done : done + count]
            done += count
            with store.fetched(span.part) as part:
                tokens = np.memmap(part, dtype, "r")[slice(*span.tokens)]
                for documents, stretch in whole_documents(own):
                    writer.write(tokens[stretch], own[documents])
        entry = writer.close()
    store.write_bytes(pair.record, json.dumps(entry).encode())
    return entry


class Pairs:
    """Cuts each set's documents into pairs of at most `shard_tokens` tokens, part by part; a longer document is a pair of
    its own. `ready` fills with tasks for an engine, `done` takes their results, `entries` are what the manifests say.
    """

    def __init__(self, job: Job, output: str, shard_tokens: int) -> None:
        self._job, self._output, self._shard_tokens = job, output, shard_tokens
        self._sets: dict[str, _Set] = {}
        self.ready: collections.deque[Stretch | Ending | Pair] = collections.deque()
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}
        self._hashes: dict[tuple[str, int], dict[int, bytes]] = {}
        self._closed: dict[tuple[str, int], tuple[Pair, int]] = {}  # written in so many stretches
        self._places: dict[str, Places] = {}  # of parts: where their tokens go
        self._left: dict[str, int] = {}  # tokens of parts that are not there yet

    def add(self, record: dict[str, Any]) -> None:
        """The parts of the next task, in task order."""
        for name, file in record["parts"].items():
            if name not in self._sets:
                self._begin(name)
                self._sets[name] = _Set(building_folder(self._job.work, self._output, name), name)
            self._cut(self._sets[name], file, record.get("moved", {}).get(file))

    def _begin(self, name: str) -> None:
        """On a remote store a set is built where it belongs: what is there before its first pair is not this run's.
        Raises UserError."""
        mark = self._job.path(f"begun-{name}")
        if store.is_remote(self._output) and store.read_bytes(mark) is None:
            refuse_existing(self._output, [name])
            store.write_bytes(mark, b"begun")

    def close(self) -> None:
        """There are no more."""
        for each in self._sets.values():
            if each.spans:
                self._end(each)

    def _cut(self, each: "_Set", name: str, moved: Places | None) -> None:
        """The documents of a part into pairs. moved: where its tokens are, if not in the part."""
        part, size = self._job.path(name), self._job.vocabulary.dtype.itemsize
        ends = np.cumsum(_lengths(part), dtype=np.int64)
        if moved is None:
            self._left[name], self._places[name] = int(ends[-1]) if len(ends) else 0, []
            source = [(part, 0, self._left[name])]
        else:
            source = [
                (store.join(self._job.work, file), first // size, (first + count) // size)
                for file, first, count in moved
            ]
        done = 0
        while done < len(ends):
            start = int(ends[done - 1]) if done else 0
            stop = int(np.searchsorted(ends, start + self._shard_tokens - each.filled, side="right"))
            if stop == done and not each.filled:
                stop = done + 1
            if stop > done:
                span = Span(part, (done, stop), (start, int(ends[stop - 1])))
                self._take(each, name, span, source)
                while each.waiting >= STRETCH_TOKENS:
                    self._stretch(each, STRETCH_TOKENS)
            if stop < len(ends):
                self._end(each)
            done = max(stop, done)

    def _take(self, each: "_Set", name: str, span: Span, source: list[tuple[str, int, int]]) -> None:
        count, size = span.tokens[1] - span.tokens[0], self._job.vocabulary.dtype.itemsize
        if name in self._left and not store.is_remote(each.folder):
            file = f"sets/{store.split(each.folder)[1]}/shard-{each.index:05d}.bin"
            self._places[name].append((file, each.filled * size, count * size))
            if self._is_done(each):
                self._arrived(name, count)
        each.take(span, source)

    def _arrived(self, name: str, count: int) -> None:
        """So many tokens of a part are in their pairs."""
        self._left[name] -= count
        if not self._left[name]:
            note_moved(self._job, name, self._places.pop(name))
            del self._left[name]

    def _is_done(self, each: "_Set") -> bool:
        """Whether an earlier run wrote the pair under way."""
        if each.done is None:
            found = store.read_bytes(self._record(each))
            each.done = found is not None
            if found is not None:
                self.entries[each.folder, each.index] = json.loads(found)
        return each.done

    def _record(self, each: "_Set") -> str:
        return self._job.path(f"pair-{each.index:05d}-{each.name}.json")

    def _stretch(self, each: "_Set", count: int) -> None:
        start, tokens = each.give(count)
        if not store.is_remote(each.folder) and not self._is_done(each):
            dtype = self._job.vocabulary.dtype
            self.ready.append(Stretch(each.folder, each.index, dtype.name, start * dtype.itemsize, tokens))

    def _end(self, each: "_Set") -> None:
        if each.waiting:
            self._stretch(each, each.waiting)
        if not self._is_done(each):
            dtype = self._job.vocabulary.dtype.name
            pair = Pair(each.folder, each.index, dtype, tuple(each.spans), self._record(each))
            if store.is_remote(each.folder):
                self.ready.append(pair)
            else:
                self._closed[each.folder, each.index] = pair, each.stretches
                self._finish(each.folder, each.index)
        each.next()

    def done(self, result: tuple[Any, Any]) -> None:
        """What an engine brought back of a task in `ready`."""
        task, value = result
        if isinstance(task, Stretch):
            self._hashes.setdefault((task.folder, task.index), {})[task.offset] = value
            for part, start, stop in task.tokens:
                if (name := store.split(part)[1]) in self._left:
                    self._arrived(name, stop - start)
            self._finish(task.folder, task.index)
        else:
            self.entries[task.folder, task.index] = value

    def _finish(self, folder: str, index: int) -> None:
        pair, stretches = self._closed.get((folder, index), (None, 0))
        hashes = self._hashes.get((folder, index), {})
        if pair is not None and len(hashes) == stretches:
            self.ready.append(Ending(pair, b"".join(value for _, value in sorted(hashes.items()))))
            del self._closed[folder, index], self._hashes[folder, index]

    def of(self, folder: str) -> list[dict[str, Any]]:
        """The entries of a set's pairs, in order."""
        return [entry for (where, _), entry in sorted(self.entries.items()) if where == folder]


class _Set:
    """The pair of a set that is under way."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name, self.index = folder, name, -1
        self.next()

    def next(self) -> None:
        self.index += 1
        self.spans: list[Span] = []
        self._waiting: collections.deque[tuple[str, int, int]] = collections.deque()
        self.filled = self.waiting = self.stretches = 0  # tokens, tokens not given yet
        self.done: bool | None = None

    def take(self, span: Span, source: list[tuple[str, int, int]]) -> None:
        """The documents of a span. source: where the tokens of its part are, one piece after another."""
        self.spans.append(span)
        first = 0
        for file, start, stop in source:
            low, high = max(first, span.tokens[0]), min(first + stop - start, span.tokens[1])
            if low < high:
                self._waiting.append((file, start + low - first, start + high - first))
            first += stop - start
        self.filled += span.tokens[1] - span.tokens[0]
        self.waiting += span.tokens[1] - span.tokens[0]

    def give(self, count: int) -> tuple[int, tuple[tuple[str, int, int], ...]]:
        """The next `count` tokens of the pair: which is the first, and where they are."""
        first, out = self.stretches * STRETCH_TOKENS, []
        self.waiting -= count
        self.stretches += 1
        while count:
            part, start, stop = self._waiting.popleft()
            taken = min(count, stop - start)
            out.append((part, start, start + taken))
            if start + taken < stop:
                self._waiting.appendleft((part, start + taken, stop))
            count -= taken
        return first, tuple(out)
