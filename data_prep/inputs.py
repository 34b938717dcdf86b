"""What a run reads, and how it is divided: inputs in name order -> pieces of files -> tasks.

The division depends on the inputs alone, never on the number of workers, so that any number of them makes the same
bytes.
"""

import glob
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastcpt import UserError
from fastcpt.data_prep import store
from fastcpt.data_prep.store import Stat

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
# About a third of a second of tokenizing: small enough to share out evenly, large enough for its files to cost nothing.
TASK_BYTES = 32 << 20
COMPRESSED_TASK_BYTES = TASK_BYTES // 4  # as long to tokenize
CHECK_DOCUMENTS = 32  # of a run, shared out among its tasks


@dataclass(frozen=True)
class Input:
    """One input file. `name` is its path below the folder that all inputs share, `path` where to open it (a path or a
    URL), size in bytes, `version` as in `store.Stat`."""

    name: str
    path: str
    suffix: str
    size: int
    version: str


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
    for path, _, names in os.walk(folder):
        yield from (os.path.join(path, name) for name in names)


def _corpus(folder: str, paths: Iterable[str]) -> list[str]:
    """Of the files below a folder those to read: not what preparation itself wrote there, for a ledger is no corpus."""
    paths = list(paths)
    names: dict[str, set[str]] = {}
    for path in paths:
        parent, name = store.split(path)
        names.setdefault(parent, set()).add(name)
    own = {parent for parent, found in names.items() if {"manifest.json", "token_bytes.npy"} <= found}
    return [
        path
        for path in paths
        if suffix_of(path)
        and store.split(path)[0] not in own
        and not any(part.endswith(".partial") for part in path[len(folder) :].split("/")[:-1])
    ]


def _expand(argument: str) -> dict[str, Stat]:
    """The files that one INPUT names. Raises UserError when there are none."""
    nothing = f"{argument}: no file in this folder ends in one of {', '.join(SUFFIXES)}"
    found: dict[str, Stat] | None
    if store.is_remote(argument):
        found = store.find(argument)
        if found and argument not in found and not store.is_pattern(argument):
            found = {path: found[path] for path in _corpus(argument, found)}
            if not found:
                raise UserError("inputs-missing", nothing)
    elif os.path.isdir(argument):
        found = {path: store.stat(path) for path in _corpus(argument, _walk(argument))}
        if not found:
            raise UserError("inputs-missing", nothing)
    elif os.path.exists(argument):
        found = {argument: store.stat(argument)}
    else:
        found = {path: store.stat(path) for path in glob.glob(argument, recursive=True) if os.path.isfile(path)}
    if not found:
        raise UserError(
            "inputs-missing", f"{argument}: no such file or folder, and no file matches it as a pattern; check the path"
        )
    for path in found:
        if suffix_of(path) is None:
            raise UserError(
                "input-suffix", f"{path}: its name ends in none of {', '.join(SUFFIXES)}; rename it or leave it out"
            )
    return found


def find_inputs(arguments: Iterable[str]) -> list[Input]:
    """All input files, sorted by name. Raises UserError when an INPUT names none or a file is named twice."""
    found: dict[str, tuple[str, Stat]] = {}
    for argument in arguments:
        for path, stat in _expand(argument).items():
            whole = path if store.is_remote(path) else os.path.abspath(path)
            if whole in found:
                raise UserError(
                    "input-twice", f"{path}: named twice, so its documents would count double; give each input once"
                )
            found[whole] = path, stat
    if not found:
        raise UserError("inputs-missing", "no inputs: name at least one file, folder or pattern")
    levels = zip(*(whole.split("/")[:-1] for whole in found))
    shared = "".join(f"{level[0]}/" for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    inputs = []
    for whole, (path, stat) in found.items():
        suffix = suffix_of(path)
        assert suffix is not None
        inputs.append(Input(whole.removeprefix(shared), path, suffix, stat.size, stat.version))
    return sorted(inputs, key=lambda source: source.name)


def _row_groups(source: Input) -> list[tuple[int, int, int]]:
    """(first row group, last + 1, bytes) of each piece of a parquet file."""
    from fastcpt.data_prep import parquet

    sizes = parquet.group_sizes(source.path)
    pieces = []
    start = weight = 0
    for group, size in enumerate(sizes):
        if weight and weight + size > TASK_BYTES:
            pieces.append((start, group, weight))
            start, weight = group, 0
        weight += size
    return [*pieces, (start, len(sizes), weight or source.size)]


def _pieces(inputs: list[Input]) -> Iterator[tuple[Piece, int]]:
    tables = [source for source in inputs if source.suffix == ".parquet"]
    with ThreadPoolExecutor(16) as threads:  # a store answers many questions at once
        row_groups = dict(zip((source.name for source in tables), threads.map(_row_groups, tables)))
    for index, source in enumerate(inputs):
        if source.suffix == ".jsonl":
            for start in range(0, source.size, TASK_BYTES) or (0,):
                stop = min(start + TASK_BYTES, source.size)
                yield Piece(index, source, start, stop), stop - start
        elif source.suffix == ".parquet":
            for start, stop, weight in row_groups[source.name]:
                yield Piece(index, source, start, stop), weight
        else:
            yield Piece(index, source, 0, source.size), source.size


def make_tasks(inputs: list[Input]) -> list[Task]:
    """Packs pieces, in order, into tasks of about TASK_BYTES: a large file is several tasks, a task many small files."""
    packs: list[list[Piece]] = [[]]
    weights = [0]
    for piece, size in _pieces(inputs):
        compressed = piece.source.suffix in (".jsonl.gz", ".jsonl.zst")
        if packs[-1] and weights[-1] + size > (COMPRESSED_TASK_BYTES if compressed else TASK_BYTES):
            packs.append([])
            weights.append(0)
        packs[-1].append(piece)
        weights[-1] += size
    shares = [index * CHECK_DOCUMENTS // len(packs) for index in range(len(packs) + 1)]
    return [
        Task(index, tuple(pieces), weight, shares[index + 1] - shares[index])
        for index, (pieces, weight) in enumerate(zip(packs, weights))
    ]
