"""What tasks leave in the folder of an unfinished run: token ids in part files, and a record of what was done.

A task's record `tasks/000000.json` is written last, so that a task without one has not been done.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastcpt import UserError
from fastcpt.data_prep import store
from fastcpt.data_prep.documents import Document
from fastcpt.data_prep.encoding import Backend, Vocabulary
from fastcpt.integrity import block_hash

MAX_SETS = 1000
EXAMPLES = 10  # places that the ledger keeps for each reason and input; all are counted
WRITE_TOKENS = 4 << 20


@dataclass(frozen=True)
class Job:
    """What the tasks of a run have in common. work: the folder (path or URL) of an unfinished run, with
    `tokenizer.json`. dedup: keep the first of documents with the same text (`dedup.py`)."""

    work: str
    vocabulary: Vocabulary
    text_key: str
    group_key: str | None
    val_fraction: float
    on_error: Literal["fail", "skip"]
    backend: Backend
    dedup: bool = False

    @property
    def folder(self) -> str:
        return store.join(self.work, "tasks")

    def path(self, file: str) -> str:
        return store.join(self.folder, file)

    def set_of(self, document: Document) -> str:
        """ "", "val", "GROUP" or "GROUP-val". The choice depends on the bytes of the text alone."""
        validation = self.val_fraction and block_hash(document.data) < self.val_fraction * 2**64
        return "-".join(filter(None, (document.group, "val" if validation else "")))


def set_folder(output: str, name: str) -> str:
    """Where a set belongs: OUTPUT, OUTPUT-val, OUTPUT-GROUP."""
    return "-".join(filter(None, (output.rstrip("/"), name)))


def building_folder(work: str, output: str, name: str) -> str:
    """Where a set is built."""
    final = set_folder(output, name)
    return final if store.is_remote(output) else store.join(work, "sets", store.split(final)[1])


def refuse_existing(output: str, names: Iterable[str]) -> None:
    for name in names:
        folder = set_folder(output, name)
        if store.has_files(folder):
            raise UserError("output-exists", f"{folder}: exists already; remove it, or choose another --output")


def part_files(task: int, name: str, kind: str = "") -> tuple[str, str]:
    """Of set `name` the tokens that a task made, and the lengths of the documents in tokens, int32."""
    return f"{task:06d}-{name}{kind}.tokens", f"{task:06d}-{name}{kind}.lengths"


def whole_documents(lengths: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """(documents, tokens) of stretches of some millions of tokens, so that memory does not depend on a part's size."""
    ends = np.cumsum(lengths, dtype=np.int64)
    done = 0
    while done < len(ends):
        start = int(ends[done - 1]) if done else 0
        stop = max(done + 1, int(np.searchsorted(ends, start + WRITE_TOKENS, side="right")))
        yield slice(done, stop), slice(start, int(ends[stop - 1]))
        done = stop


class Files:
    """Files of a task that are appended to and get their names, and a place in its record, when all are whole.

    They are not synced: the record holds the CRC-32 of each, and a task counts as finished when they agree.
    """

    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        self._job, self._stack = job, stack
        self._local: dict[str, Path] = {}
        self.record: dict[str, list[int]] = {}  # name -> [bytes, CRC-32]

    def append(self, name: str, array: np.ndarray) -> None:
        fresh = name not in self._local
        if fresh:
            self._local[name] = self._stack.enter_context(store.staged(self._job.path(name)))
            self.record[name] = [0, 0]
        with open(self._local[name], "wb" if fresh else "ab") as file:
            file.write(array.data)
        size, crc = self.record[name]
        self.record[name] = [size + array.nbytes, zlib.crc32(array.data, crc)]


class Parts:
    """The part files of a task, two a set."""

    def __init__(self, job: Job, task: int, files: Files, kind: str = "") -> None:
        self._job, self._task, self._files, self._kind = job, task, files, kind
        self.record: dict[str, str] = {}  # set -> file of its tokens

    def write(self, name: str, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if name not in self.record and len(self.record) >= MAX_SETS:
            raise UserError(
                "too-many-groups",
                f"--group-key {self._job.group_key}: over {MAX_SETS:,} values; choose a key with fewer",
            )
        tokens_file, lengths_file = part_files(self._task, name, self._kind)
        self._files.append(tokens_file, tokens)
        self._files.append(lengths_file, lengths.astype("<i4"))
        self.record[name] = tokens_file


def record_file(task: int, kind: str = "") -> str:
    return f"{task:06d}{kind}.json"


def write_record(job: Job, file: str, record: dict[str, Any]) -> None:
    store.write_bytes(job.path(file), json.dumps(record, ensure_ascii=False).encode())


def finished_record(task: int, job: Job, kind: str = "") -> dict[str, Any] | None:
    """The record of a task whose files are all there, as they were written, else None. Its "moved": {file: places} of
    those that are in pairs already (`Pairs`)."""
    data = store.read_bytes(job.path(record_file(task, kind)))
    try:
        record = json.loads(data or b"")
    except ValueError:  # cut off by a loss of power
        return None
    record["moved"] = {}
    for name, (size, crc) in record["files"].items():
        if store.is_remote(job.work):  # where an object is there as it was uploaded, or not at all
            if store.size(job.path(name)) != size:
                return None
        elif _crc32(job, [(f"tasks/{name}", 0, size)]) != crc:
            record["moved"][name] = _moved(job, name)
            if _crc32(job, record["moved"][name]) != crc:
                return None
    return record


# Where a part's bytes are: (file below the work folder, first byte, bytes) of each piece.
Places = list[tuple[str, int, int]]


def note_moved(job: Job, name: str, places: Places) -> None:
    """The file's bytes are there now too, and it makes room."""
    store.write_bytes(job.path(f"{name}.moved"), json.dumps(places).encode())
    os.unlink(job.path(name))


def _moved(job: Job, name: str) -> Places:
    try:
        return [
            (file, start, size) for file, start, size in json.loads(store.read_bytes(job.path(f"{name}.moved")) or b"")
        ]
    except ValueError:  # none, or cut off by a loss of power
        return []


def _crc32(job: Job, places: Places) -> int | None:
    """Of the bytes at these places; None when there are none."""
    crc = 0 if places else None
    for name, start, size in places:
        try:
            with open(store.join(job.work, name), "rb", buffering=0) as file:
                file.seek(start)
                while size:
                    block = file.read(min(size, 1 << 20))
                    if not block:
                        return None
                    size, crc = size - len(block), zlib.crc32(block, crc or 0)
        except FileNotFoundError:
            return None
    return crc
