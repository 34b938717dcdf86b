"""One task of preparation: pieces of inputs -> token ids in part files and a small record of what was done.

`run_task` is a pure function of its task and job: any process, on any machine that sees the files, may run it, again
if need be.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fastcpt import UserError
from fastcpt.data_prep import dedup, store
from fastcpt.data_prep.documents import Document, Reject
from fastcpt.data_prep.encoding import Encoder, Tools, Vocabulary, make_tools
from fastcpt.data_prep.inputs import Piece, Task
from fastcpt.data_prep.parts import EXAMPLES, Files, Job, Parts, finished_record, record_file, write_record
from fastcpt.data_prep.readers import PieceReader, lines_before

BATCH_BYTES = 4 << 20
# Every run compares gigatoken with the reference, on documents up to CHECK_BYTES: the first `Task.check_first` of each task,
# and of the others CHECK_SHARE, at random, as long as that is at most CHECK_MOST of a task's bytes.
CHECK_BYTES = 64 << 10
CHECK_SHARE, CHECK_MOST = 0.0002, 0.0005


@functools.lru_cache(1)
def _tools(job: Job) -> Tools:
    """Built once per process and kept."""
    tokenizer_json = store.read_bytes(store.join(job.work, "tokenizer.json"))
    if tokenizer_json is None:
        raise UserError(
            "output-not-shared",
            f"{job.work}: not to be seen from {os.uname().nodename}; put --output where all nodes can see it",
        )
    return make_tools(tokenizer_json, job.vocabulary, job.backend)


@dataclass(eq=False)
class Tally:
    """What became of a piece. sets: name -> [documents, tokens, text bytes]."""

    piece: Piece
    lines: int = 0
    blank: int = 0
    sets: dict[str, list[int]] = field(default_factory=dict)
    rejects: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reject(self, reject: Reject) -> None:
        entry = self.rejects.setdefault(reject.reason, {"count": 0, "first": []})
        entry["count"] += reject.documents
        if len(entry["first"]) < EXAMPLES:
            entry["first"].append([reject.line, reject.offset])

    def record(self) -> dict[str, Any]:
        documents = sum(counts[0] for counts in self.sets.values())
        rejected = sum(entry["count"] for entry in self.rejects.values())
        assert documents + rejected == self.lines - self.blank, (self.piece, documents, rejected, self.lines)
        return {
            "input": self.piece.input,
            "lines": self.lines,
            "blank": self.blank,
            "sets": self.sets,
            "rejects": self.rejects,
        }


def place(piece: Piece, line: int, offset: int) -> str:
    """`file:line (byte offset)`, the line counted from 1 in the whole file."""
    number = lines_before(piece) + line + 1
    return f"{piece.source.path}:{number} ({f'byte {offset}' if offset >= 0 else f'row {number}'})"


def stop(piece: Piece, reject: Reject, instead: str = ", or leave such documents out with --on-error skip") -> NoReturn:
    raise UserError(
        f"input-{reject.reason.lower().replace(' ', '-')}",
        f"{place(piece, reject.line, reject.offset)}: {reject.reason}: {reject.detail}; mend the file{instead}",
    )


class Entry(NamedTuple):
    """A good document on its way to the tokenizer."""

    tally: Tally
    document: Document
    set: str


def _documents(task: Task, job: Job, uncovered: Callable[[bytes], int | None], tallies: list[Tally]) -> Iterator[Entry]:
    """The good documents of a task; rejected ones are tallied, or stop the run."""
    reserved = job.val_fraction > 0
    for piece in task.pieces:
        tally = Tally(piece)
        tallies.append(tally)
        reader = PieceReader(piece, job.text_key, job.group_key)
        one_set = None if reserved or job.group_key is not None else ""
        for item in reader:
            if isinstance(item, Document):
                if (byte := uncovered(item.data)) is not None:
                    item = Reject("no id", f"the tokenizer has none for byte 0x{byte:02x}", item.line, item.offset)
                elif reserved and item.group and (item.group == "val" or item.group.endswith("-val")):
                    detail = f"{item.group!r}, but names that end in val are those of the validation sets"
                    item = Reject("not a name", detail, item.line, item.offset)
            if isinstance(item, Document):
                yield Entry(tally, item, job.set_of(item) if one_set is None else one_set)
            elif job.on_error == "fail":
                stop(piece, item)
            else:
                tally.reject(item)
        tally.lines, tally.blank = reader.lines, reader.blank


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += len(entry.document.data) + 256
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Check:
    """Compares a sample of a task's documents with the reference, the first `first` included."""

    def __init__(self, reference: Encoder, task: Task) -> None:
        self._reference, self._first, self._random = reference, task.check_first, np.random.default_rng(task.index)
        self.checked = self._checked_bytes = self._bytes = 0

    def _sample(self, batch: list[Entry]) -> list[int]:
        sample: list[int] = []
        drawn = self._random.random(len(batch)) < CHECK_SHARE
        for index, entry in enumerate(batch):
            size = len(entry.document.data)
            self._bytes += size
            allowed = drawn[index] and self._checked_bytes + size <= CHECK_MOST * self._bytes
            if size <= CHECK_BYTES and (self.checked + len(sample) < self._first or allowed):
                sample.append(index)
                self._checked_bytes += size
        return sample

    def __call__(self, batch: list[Entry], ids: np.ndarray, ends: np.ndarray) -> None:
        """ids of all documents; ends (D,): where those of each end. Raises UserError that names the first to differ."""
        sample = self._sample(batch)
        expected, counts = self._reference.encode([batch[index].document.data for index in sample])
        for index, want in zip(sample, np.split(expected, np.cumsum(counts)[:-1]), strict=False):
            got = ids[ends[index - 1] if index else 0 : ends[index]]
            if not np.array_equal(got, want):
                tally, document, _ = batch[index]
                raise UserError(
                    "tokenizers-disagree",
                    f"{place(tally.piece, document.line, document.offset)}: gigatoken and the reference tokenizer give "
                    f"different ids for this document ({len(got)} and {len(want)}); use --tokenizer-backend tokenizers",
                )
        self.checked += len(sample)


def _check_range(batch: list[Entry], ids: np.ndarray, ends: np.ndarray, vocabulary: Vocabulary) -> None:
    """No id may be too high for the vocabulary, which decides the dtype, nor be a special token's."""
    least, most = int(ids.min(initial=vocabulary.size)), int(ids.max(initial=0))
    for low, high in (*vocabulary.reserved, (vocabulary.size, 1 << 32)):
        if most < low or least >= high:  # nearly always, and known sooner than from each id
            continue
        wrong = np.flatnonzero(ids - np.uint32(low) < np.uint32(high - low))  # one comparison: below `low` wraps around
        if len(wrong):
            tally, document, _ = batch[int(np.searchsorted(ends, wrong[0], side="right"))]
            raise UserError(
                "tokenizer-id-reserved",
                f"{place(tally.piece, document.line, document.offset)}: the tokenizer gives id {ids[wrong[0]]}, which "
                f"is a special token's or not below {vocabulary.size:,}; use a tokenizer that gives text other ids",
            )


def _with_eod(ids: np.ndarray, ends: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The ids in the set's dtype, an end-of-document token after each document."""
    out = np.full(len(ids) + len(ends), vocabulary.eod, vocabulary.dtype)
    start = 0
    for number, stop in enumerate(ends.tolist()):  # a mask for all at once would be no faster, and as large again
        out[start + number : stop + number] = ids[start:stop]
        start = stop
    return out


def _write_batch(batch: list[Entry], tokens: np.ndarray, lengths: np.ndarray, parts: Parts) -> None:
    done = 0
    for (tally, name), entries in itertools.groupby(batch, key=lambda entry: (entry.tally, entry.set)):
        sizes = [len(entry.document.data) for entry in entries]
        counts = tally.sets.setdefault(name, [0, 0, 0])
        counts[0] += len(sizes)
        counts[1] += int(lengths[done : done + len(sizes)].sum())
        counts[2] += sum(sizes)
        done += len(sizes)
    assert done == len(batch) == len(lengths)
    distinct = sorted({entry.set for entry in batch})
    if len(distinct) == 1:
        parts.write(distinct[0], tokens, lengths)
        return
    index = {name: number for number, name in enumerate(distinct)}
    set_of_document = np.fromiter((index[entry.set] for entry in batch), np.int64, len(batch))
    set_of_token = np.repeat(set_of_document, lengths)
    for name, number in index.items():
        parts.write(name, tokens[set_of_token == number], lengths[set_of_document == number])


def run_task(task: Task, job: Job) -> dict[str, Any]:
    """Tokenizes a task's documents, writes its files and then its record, which it returns with "found": whether an
    earlier run did all that.

    Raises UserError at a document that cannot be used when `job.on_error` is "fail", and when gigatoken and its
    reference differ.
    """
    if (finished := finished_record(task.index, job)) is not None:
        return {**finished, "found": True}
    encoder, reference, uncovered = _tools(job)
    check = None if reference is None else _Check(reference, task)
    tallies: list[Tally] = []
    keys = dedup.Keys()
    with contextlib.ExitStack() as stack:
        files = Files(job, stack)
        parts = Parts(job, task.index, files)
        for batch in _batches(_documents(task, job, uncovered, tallies)):
            ids, counts = encoder.encode([entry.document.data for entry in batch])
            assert len(counts) == len(batch)
            ends = np.cumsum(counts)
            _check_range(batch, ids, ends, job.vocabulary)
            if check is not None:
                check(batch, ids, ends)
            _write_batch(batch, _with_eod(ids, ends, job.vocabulary), counts + 1, parts)
            if job.dedup:
                pieces = {tally: number for number, tally in enumerate(tallies)}
                texts = [entry.document.data for entry in batch]
                keys.add(texts, [pieces[entry.tally] for entry in batch], [entry.set for entry in batch])
        sets = keys.write(files, task.index) if job.dedup else []
    record = {
        "task": task.index,
        "bytes": task.weight,
        "checked": check.checked if check else 0,
        "parts": parts.record,
        "sets": sets,
        "pieces": [tally.record() for tally in tallies],
        "files": files.record,
    }
    write_record(job, record_file(task.index), record)
    return {**record, "found": False}
