"""What a run reads, and how it is divided: inputs in name order -> pieces of files -> tasks.

The division depends on the inputs alone, never on the number of workers, so that any number of them makes the same
bytes.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
# About a third of a second of tokenizing: small enough to share out evenly, large enough for its files to cost nothing.
TASK_BYTES = 32 << 20
CHECK_DOCUMENTS = 32


@dataclass(frozen=True)
class Input:
    """One input file. `name` is its path below the folder that all inputs share, `path` where to open it."""

    name: str
    path: str
    suffix: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """What one task reads of one input: the lines of a .jsonl that start in bytes [start, stop), the row groups
    [start, stop) of a .parquet, and the whole of any other file. `input` is its place among the run's inputs."""

    input: int
    source: Input
    start: int
    stop: int


@dataclass(frozen=True)
class Task:
    """Pieces that are tokenized together. weight: their size in bytes, for the progress bar. check_first: how many of
    its first documents are tokenized by the reference too."""

    index: int
    pieces: tuple[Piece, ...]
    weight: int
    check_first: int


def suffix_of(path: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), None)


def _walk(folder: str) -> Iterator[str]:
    """Every file below a folder, but not what preparation itself wrote there: a ledger is no corpus."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.endswith(".partial")]
        if not {"manifest.json", "token_bytes.npy"} <= set(names):
            yield from (os.path.join(path, name) for name in names)


def _expand(argument: str) -> list[str]:
    """The files that one INPUT names. Raises UserError when there are none."""
    if os.path.isdir(argument):
        found = [path for path in _walk(argument) if suffix_of(path)]
        if not found:
            raise UserError(f"{argument}: no file in this folder ends in one of {', '.join(SUFFIXES)}")
        return found
    found = (
        [argument]
        if os.path.exists(argument)
        else [p for p in glob.glob(argument, recursive=True) if os.path.isfile(p)]
    )
    if not found:
        raise UserError(f"{argument}: no such file or folder, and no file matches it as a pattern; check the path")
    for path in found:
        if suffix_of(path) is None:
            raise UserError(f"{path}: its name ends in none of {', '.join(SUFFIXES)}; rename it or leave it out")
        if not os.path.isfile(path):
            raise UserError(f"{path}: not a regular file; write its content to a file first")
    return found


def find_inputs(arguments: Iterable[str]) -> list[Input]:
    """All input files, sorted by name. Raises UserError when an INPUT names none or a file is named twice."""
    paths: dict[str, str] = {}
    for argument in arguments:
        for path in _expand(argument):
            real = os.path.abspath(path)
            if real in paths:
                raise UserError(f"{path}: named twice, so its documents would count double; give each input once")
            paths[real] = path
    if not paths:
        raise UserError("no inputs: name at least one file, folder or pattern")
    root = os.path.commonpath([os.path.dirname(real) for real in paths])
    inputs = []
    for real, path in paths.items():
        status = os.stat(path)
        suffix = suffix_of(path)
        assert suffix is not None
        inputs.append(Input(Path(real).relative_to(root).as_posix(), path, suffix, status.st_size, status.st_mtime_ns))
    return sorted(inputs, key=lambda source: source.name)


def _row_groups(source: Input) -> Iterator[tuple[int, int, int]]:
    """(first row group, last + 1, bytes) of each piece of a parquet file; a damaged one is left to its reader."""
    try:
        with pq.ParquetFile(source.path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        sizes = []
    start = weight = 0
    for group, size in enumerate(sizes):
        if weight and weight + size > TASK_BYTES:
            yield start, group, weight
            start, weight = group, 0
        weight += size
    yield start, len(sizes), weight or source.size


def _pieces(inputs: list[Input]) -> Iterator[tuple[Piece, int]]:
    for index, source in enumerate(inputs):
        if source.suffix == ".jsonl":
            for start in range(0, source.size, TASK_BYTES) or (0,):
                stop = min(start + TASK_BYTES, source.size)
                yield Piece(index, source, start, stop), stop - start
        elif source.suffix == ".parquet":
            for start, stop, weight in _row_groups(source):
                yield Piece(index, source, start, stop), weight
        else:
            yield Piece(index, source, 0, source.size), source.size


def make_tasks(inputs: list[Input]) -> list[Task]:
    """Packs pieces, in order, into tasks of about TASK_BYTES: a large file is several tasks, a task many small files."""
    packs: list[list[Piece]] = [[]]
    weights = [0]
    for piece, size in _pieces(inputs):
        if packs[-1] and weights[-1] + size > TASK_BYTES:
            packs.append([])
            weights.append(0)
        packs[-1].append(piece)
        weights[-1] += size
    check_first = -(-CHECK_DOCUMENTS // len(packs))
    return [
        Task(index, tuple(pieces), weight, check_first) for index, (pieces, weight) in enumerate(zip(packs, weights))
    ]
