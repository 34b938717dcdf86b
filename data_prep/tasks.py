"""One task of preparation: pieces of inputs -> token ids in part files and a small record of what was done.

`run_task` is a pure function of its task and job: any process, on any machine that sees the files, may run it, again
if need be. Its record `tasks/000000.json` is written last, so that a task without one has not been done.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from fastcpt import UserError
from fastcpt.data_prep.encoding import Backend, Encoder, Tools, Vocabulary, make_tools
from fastcpt.data_prep.inputs import Piece, Task
from fastcpt.data_prep.readers import Document, PieceReader, Reject, lines_before
from fastcpt.integrity import block_hash, read_json, sync_file, write_json

BATCH_BYTES = 4 << 20
EXAMPLES = 10  # places that the ledger keeps for each reason and input; all are counted
MAX_SETS = 1000
# Every run compares gigatoken with the reference, on documents up to CHECK_BYTES: the first of each task, and those whose
# hash falls in CHECK_SHARE.
CHECK_BYTES = 64 << 10
CHECK_SHARE = 0.0004


@dataclass(frozen=True)
class Job:
    """What the tasks of a run have in common. work: the folder of an unfinished run, with `tokenizer.json`."""

    work: Path
    vocabulary: Vocabulary
    text_key: str
    group_key: str | None
    val_fraction: float
    on_error: Literal["fail", "skip"]
    backend: Backend

    @property
    def folder(self) -> Path:
        return self.work / "tasks"

    def record_path(self, task: int) -> Path:
        return self.folder / f"{task:06d}.json"

    def part_path(self, task: int, name: str) -> Path:
        """Tokens of set `name` that a task made; beside it `.lengths`, int32, one a document."""
        return self.folder / f"{task:06d}-{name}.tokens"

    def set_of(self, document: Document) -> str:
        """ "", "val", "GROUP" or "GROUP-val". The choice depends on the bytes of the text alone."""
        validation = self.val_fraction and block_hash(document.data) < self.val_fraction * 2**64
        return "-".join(filter(None, (document.group, "val" if validation else "")))


def _tools(job: Job) -> Tools:
    return make_tools((job.work / "tokenizer.json").read_bytes(), job.vocabulary, job.backend)


@dataclass
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


def _stop(piece: Piece, reject: Reject) -> NoReturn:
    raise UserError(
        f"{place(piece, reject.line, reject.offset)}: {reject.reason}: {reject.detail}; "
        "mend the file, or leave such documents out with --on-error skip"
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
        for item in reader:
            if isinstance(item, Document):
                if (byte := uncovered(item.data)) is not None:
                    item = Reject("no id", f"the tokenizer has none for byte 0x{byte:02x}", item.line, item.offset)
                elif reserved and item.group and (item.group == "val" or item.group.endswith("-val")):
                    detail = f"{item.group!r}, but names that end in val are those of the validation sets"
                    item = Reject("not a name", detail, item.line, item.offset)
            if isinstance(item, Document):
                yield Entry(tally, item, job.set_of(item))
            elif job.on_error == "fail":
                _stop(piece, item)
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


def _check(batch: list[Entry], ids: np.ndarray, ends: np.ndarray, reference: Encoder, first: int) -> int:
    """Compares the sample of a batch with the reference, the first `first` documents included. Returns how many."""
    sample: list[int] = []
    for index, entry in enumerate(batch):
        data = entry.document.data
        if len(data) <= CHECK_BYTES and (len(sample) < first or zlib.crc32(data) < CHECK_SHARE * 2**32):
            sample.append(index)
    expected, counts = reference.encode([batch[index].document.data for index in sample])
    for index, want in zip(sample, np.split(expected, np.cumsum(counts)[:-1]), strict=False):
        got = ids[ends[index - 1] if index else 0 : ends[index]]
        if not np.array_equal(got, want):
            tally, document, _ = batch[index]
            raise UserError(
                f"{place(tally.piece, document.line, document.offset)}: gigatoken and the reference tokenizer give "
                f"different ids for this document ({len(got)} and {len(want)}); use --tokenizer-backend tokenizers"
            )
    return len(sample)


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
                f"{place(tally.piece, document.line, document.offset)}: the tokenizer gives id {ids[wrong[0]]}, which "
                f"is a special token's or not below {vocabulary.size:,}; use a tokenizer that gives text other ids"
            )


def _with_eod(ids: np.ndarray, ends: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The ids in the set's dtype, an end-of-document token after each document."""
    out = np.full(len(ids) + len(ends), vocabulary.eod, vocabulary.dtype)
    text = np.ones(len(out), bool)
    text[ends + np.arange(len(ends))] = False
    out[text] = ids
    return out


class _Parts:
    """The part files of a task, two a set, appended to batch by batch.

    They get their names when they are whole, so that a task that runs twice at once does no harm: both runs write the
    same bytes.
    """

    def __init__(self, job: Job, task: int) -> None:
        self._job, self._task = job, task
        self.sizes: dict[str, int] = {}

    def _paths(self, name: str) -> tuple[Path, Path]:
        tokens = self._job.part_path(self._task, name)
        return tokens, tokens.with_suffix(".lengths")

    def _unfinished(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.{os.getpid()}")

    def write(self, name: str, tokens: np.ndarray, lengths: np.ndarray) -> None:
        mode = "ab" if name in self.sizes else "wb"
        if len(self.sizes) >= MAX_SETS and mode == "wb":
            raise UserError(f"--group-key {self._job.group_key}: over {MAX_SETS:,} values; choose a key with fewer")
        for path, array in zip(self._paths(name), (tokens, lengths.astype("<i4")), strict=True):
            with open(self._unfinished(path), mode) as file:
                file.write(array.data)
        self.sizes[name] = self.sizes.get(name, 0) + tokens.nbytes

    def finish(self) -> None:
        for name in self.sizes:
            for path in self._paths(name):
                sync_file(self._unfinished(path))
                os.replace(self._unfinished(path), path)


def _write_batch(batch: list[Entry], tokens: np.ndarray, lengths: np.ndarray, parts: _Parts) -> None:
    for (tally, document, name), length in zip(batch, lengths.tolist(), strict=True):
        counts = tally.sets.setdefault(name, [0, 0, 0])
        counts[0] += 1
        counts[1] += length
        counts[2] += len(document.data)
    names = [entry.set for entry in batch]
    distinct = sorted(set(names))
    if len(distinct) == 1:
        parts.write(distinct[0], tokens, lengths)
        return
    index = {name: number for number, name in enumerate(distinct)}
    set_of_document = np.fromiter((index[name] for name in names), np.int64, len(names))
    set_of_token = np.repeat(set_of_document, lengths)
    for name, number in index.items():
        parts.write(name, tokens[set_of_token == number], lengths[set_of_document == number])


def run_task(task: Task, job: Job) -> dict[str, Any]:
    """Tokenizes a task's documents, writes its part files and then its record, which it returns.

    Raises UserError at a document that cannot be used when `job.on_error` is "fail", and when gigatoken and its
    reference differ.
    """
    encoder, reference, uncovered = _tools(job)
    parts = _Parts(job, task.index)
    tallies: list[Tally] = []
    checked = 0
    for batch in _batches(_documents(task, job, uncovered, tallies)):
        ids, counts = encoder.encode([entry.document.data for entry in batch])
        assert len(counts) == len(batch)
        ends = np.cumsum(counts)
        _check_range(batch, ids, ends, job.vocabulary)
        if reference is not None:
            checked += _check(batch, ids, ends, reference, task.check_first - checked)
        _write_batch(batch, _with_eod(ids, ends, job.vocabulary), counts + 1, parts)
    parts.finish()
    record = {
        "task": task.index,
        "bytes": task.weight,
        "checked": checked,
        "parts": parts.sizes,
        "pieces": [tally.record() for tally in tallies],
    }
    write_json(job.record_path(task.index), record)
    return record


def finished_record(task: Task, job: Job) -> dict[str, Any] | None:
    """The record of a task that an earlier run finished, else None."""
    path = job.record_path(task.index)
    if not path.exists():
        return None
    record = read_json(path, "the record of a finished task")
    for name, size in record["parts"].items():
        part = job.part_path(task.index, name)
        if not part.exists() or os.stat(part).st_size != size:
            return None
    return record
