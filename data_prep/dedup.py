"""Exact duplicates: of documents with the same text, spacing and Unicode form aside, the first in input order stays.

keys    each task writes, beside its parts, a row a document: the key of its text, and which document it is; in key order
find    the keys are divided into ranges; a range collects its rows from all tasks and names every document whose key an
        earlier one has
drop    each task that has some of these writes its parts and its record again, without them

`find` and `drop` run on an engine. Memory is bounded: by the rows (28 to 60 bytes a
document) of ROWS_AT_ONCE documents or of one task, and by a stretch of its part.
"""

import contextlib
import functools
import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcpt.data_prep import store
from fastcpt.data_prep.engines import Engine
from fastcpt.data_prep.parts import (
    Files,
    Job,
    Parts,
    finished_record,
    part_files,
    record_file,
    whole_documents,
    write_record,
)

ROWS_AT_ONCE = 2_000_000
# high, low: the key. document: its place in the task, piece and set likewise. bytes: of its text.
ROW = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("document", "<u4"), ("piece", "<u4"), ("set", "<u4"), ("bytes", "<u4")]
)
PLACE = np.dtype([("task", "<u4"), ("document", "<u4")])
REASON = "duplicate"


def keys_file(task: int) -> str:
    return f"{task:06d}.keys"


def text_key(text: bytes) -> bytes:
    """16 bytes that are the same for texts which differ in spacing or in Unicode form (NFC) alone."""
    normal = " ".join(unicodedata.normalize("NFC", text.decode()).split())
    return hashlib.blake2b(normal.encode(), digest_size=16).digest()


class Keys:
    """The rows of a task's documents."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._sets: dict[str, int] = {}
        self._documents = 0

    def add(self, texts: list[bytes], pieces: list[int], sets: list[str]) -> None:
        rows = np.empty(len(texts), ROW)
        keys = np.frombuffer(b"".join(map(text_key, texts)), "<u8").reshape(-1, 2)
        rows["high"], rows["low"] = keys[:, 0], keys[:, 1]
        rows["document"] = np.arange(self._documents, self._documents + len(texts))
        rows["piece"] = pieces
        rows["set"] = [self._sets.setdefault(name, len(self._sets)) for name in sets]
        rows["bytes"] = [len(text) for text in texts]
        self._rows.append(rows)
        self._documents += len(texts)

    def write(self, files: Files, task: int) -> list[str]:
        """In key order. Returns the names of the sets, by number."""
        rows = np.concatenate(self._rows) if self._rows else np.empty(0, ROW)
        files.append(keys_file(task), rows[np.argsort(rows["high"], kind="stable")])
        return list(self._sets)


@dataclass(frozen=True)
class Range:
    """A part of the keys: number `index` of `count` equal ones. tasks: those that have rows."""

    index: int
    count: int
    tasks: tuple[int, ...]

    @property
    def file(self) -> str:
        return f"duplicates-{self.index:05d}"


def _rows(job: Job, task: int, span: Range) -> np.ndarray:
    with store.fetched(job.path(keys_file(task))) as local:
        return in_range(np.fromfile(local, ROW), span)


def in_range(rows: np.ndarray, span: Range) -> np.ndarray:
    """Those of the rows, in key order, whose keys are in the range."""
    step = (1 << 64) // span.count + 1
    low, high = span.index * step, min((span.index + 1) * step, 1 << 64) - 1
    if low > high:  # the last of very many
        return rows[:0]
    start = np.searchsorted(rows["high"], np.uint64(low), side="left")
    stop = np.searchsorted(rows["high"], np.uint64(high), side="right")
    return rows[start:stop].copy()


def find(span: Range, job: Job) -> int:
    """Writes the places of the duplicates in a range of keys, in order. Returns how many there are. A task for an engine."""
    parts = [_rows(job, task, span) for task in span.tasks]
    rows = np.concatenate(parts)
    tasks = np.repeat(np.array(span.tasks, np.uint32), [len(part) for part in parts])
    order = np.lexsort((rows["document"], tasks, rows["low"], rows["high"]))
    rows, tasks = rows[order], tasks[order]
    again = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    places = np.empty(int(again.sum()), PLACE)
    places["task"], places["document"] = tasks[1:][again], rows["document"][1:][again]
    places.sort(order=["task", "document"])
    store.write_bytes(job.path(span.file), places.tobytes())
    return len(places)


def _places(job: Job, task: int, spans: list[Range]) -> Iterator[np.ndarray]:
    """The documents of a task that are duplicates."""
    for span in spans:
        with store.fetched(job.path(span.file)) as local:
            places = np.fromfile(local, PLACE)
        start, stop = np.searchsorted(places["task"], [task, task + 1])
        yield places["document"][start:stop]


def drop(record: dict[str, Any], job: Job, spans: list[Range]) -> dict[str, Any]:
    """Writes a task's files again without its duplicates, if it has any. Returns its new record. A task for an engine."""
    task = record["task"]
    duplicates = np.concatenate(list(_places(job, task, spans)))
    if not len(duplicates):
        return record
    if (finished := finished_record(task, job, ".kept")) is not None:
        return finished
    with store.fetched(job.path(keys_file(task))) as local:
        rows = np.fromfile(local, ROW)
    rows = rows[np.argsort(rows["document"])]
    keep = np.ones(len(rows), bool)
    keep[duplicates] = False
    tokens = np.zeros(len(rows), np.int64)
    with contextlib.ExitStack() as stack:
        files = Files(job, stack)
        parts = Parts(job, task, files, ".kept")
        for number, name in enumerate(record["sets"]):
            own = rows["set"] == number
            tokens[own] = _filter(job, task, name, keep[own], parts)
    pieces = [_without(piece, rows, ~keep & (rows["piece"] == number), tokens, record["sets"])
              for number, piece in enumerate(record["pieces"])]  # fmt: skip
    kept = {**record, "parts": parts.record, "pieces": pieces, "files": files.record}
    write_record(job, record_file(task, ".kept"), kept)
    return kept


def _filter(job: Job, task: int, name: str, keep: np.ndarray, parts: Parts) -> np.ndarray:
    """Copies the kept documents of a set's part. Returns the lengths of all, in tokens."""
    tokens_file, lengths_file = part_files(task, name)
    with store.fetched(job.path(tokens_file)) as tokens, store.fetched(job.path(lengths_file)) as local:
        lengths = np.fromfile(local, "<i4")
        ids = np.memmap(tokens, job.vocabulary.dtype, "r")
        for documents, span in whole_documents(lengths):
            stay = keep[documents]
            if stay.any():
                kept = ids[span][np.repeat(stay, lengths[documents])]
                parts.write(name, kept, lengths[documents][stay])
    return lengths


def _without(piece: dict[str, Any], rows: np.ndarray, dropped: np.ndarray, tokens: np.ndarray, sets: list[str]) -> Any:
    """A piece's record without its dropped documents, which join the rejected ones."""
    counts = {name: list(entry) for name, entry in piece["sets"].items()}
    for number, name in enumerate(sets):
        own = dropped & (rows["set"] == number)
        if own.any():
            gone = (int(own.sum()), int(tokens[own].sum()), int(rows["bytes"][own].sum(dtype=np.int64)))
            counts[name] = [have - less for have, less in zip(counts[name], gone, strict=True)]
    rejects = dict(piece["rejects"])
    if dropped.any():
        rejects[REASON] = {"count": int(dropped.sum()), "first": []}
    return {**piece, "sets": {name: entry for name, entry in counts.items() if entry[0]}, "rejects": rejects}


def remove(records: list[dict[str, Any]], job: Job, engine: Engine) -> list[dict[str, Any]]:
    """The records of a run's tasks once its duplicates are gone."""
    rows = {record["task"]: record["files"][keys_file(record["task"])][0] // ROW.itemsize for record in records}
    tasks = tuple(task for task, count in rows.items() if count)
    if not tasks:
        return records
    count = -(-sum(rows.values()) // ROWS_AT_ONCE)
    spans = [Range(index, count, tasks) for index in range(count)]
    for _ in engine(functools.partial(find, job=job), spans):
        pass
    dropped = {record["task"]: record for record in engine(functools.partial(drop, job=job, spans=spans), records)}
    return [dropped[record["task"]] for record in records]
