"""The parts of all tasks -> shard sets, each complete before it appears under its name."""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt import UserError
from fastcpt.data_prep.encoding import Vocabulary, token_bytes
from fastcpt.data_prep.inputs import Input
from fastcpt.data_prep.tasks import EXAMPLES, Job
from fastcpt.integrity import read_json, sync_directory, sync_file, write_durably, write_json
from fastcpt.shards import PairWriter, write_manifest

WRITE_TOKENS = 4 << 20
PLACE = pa.struct([("line", pa.int64()), ("byte", pa.int64())])
REJECTS = pa.list_(pa.struct([("reason", pa.string()), ("count", pa.int64()), ("first", pa.list_(PLACE))]))
LEDGER = pa.schema(
    [
        ("input", pa.string()),
        ("set", pa.string()),
        ("documents", pa.int64()),
        ("tokens", pa.int64()),
        ("text_bytes", pa.int64()),
        ("rejected", pa.int64()),
        ("blank_lines", pa.int64()),
        ("rejects", REJECTS),
    ]
)


@dataclass(frozen=True)
class Span:
    """Documents [documents[0], documents[1]) of a part file, which are its tokens [tokens[0], tokens[1])."""

    part: Path
    documents: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """One pair to write: `spans` one after another."""

    directory: Path
    index: int
    dtype: str
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return sum(span.tokens[1] - span.tokens[0] for span in self.spans) * np.dtype(self.dtype).itemsize


def _lengths(part: Path) -> np.ndarray:
    return np.fromfile(part.with_suffix(".lengths"), "<i4")


def cut_spans(parts: Iterable[Path], shard_tokens: int) -> Iterator[tuple[Span, ...]]:
    """Cuts a set's documents into pairs of at most `shard_tokens` tokens; a longer document is a pair of its own."""
    spans: list[Span] = []
    filled = 0
    for part in parts:
        ends = np.cumsum(_lengths(part), dtype=np.int64)
        done = 0
        while done < len(ends):
            start = int(ends[done - 1]) if done else 0
            stop = int(np.searchsorted(ends, start + shard_tokens - filled, side="right"))
            if stop == done and not filled:
                stop = done + 1
            if stop > done:
                spans.append(Span(part, (done, stop), (start, int(ends[stop - 1]))))
                filled += int(ends[stop - 1]) - start
            if stop < len(ends):
                yield tuple(spans)
                spans, filled = [], 0
            done = max(stop, done)
    if spans:
        yield tuple(spans)


def write_pair(pair: Pair) -> tuple[Pair, dict[str, Any]]:
    """Copies a pair's spans, some millions of tokens at a time. A task for an engine."""
    dtype = np.dtype(pair.dtype)
    writer = PairWriter(pair.directory, f"shard-{pair.index:05d}", dtype)
    for span in pair.spans:
        lengths = _lengths(span.part)[slice(*span.documents)]
        tokens = np.memmap(span.part, dtype, "r")[slice(*span.tokens)]
        ends = np.cumsum(lengths, dtype=np.int64)
        done = 0
        while done < len(ends):
            start = int(ends[done - 1]) if done else 0
            stop = max(done + 1, int(np.searchsorted(ends, start + WRITE_TOKENS, side="right")))
            writer.write(tokens[start : int(ends[stop - 1])], lengths[done:stop])
            done = stop
    return pair, writer.close()


def _merge_rejects(totals: dict[str, dict[str, Any]], rejects: dict[str, Any], lines: int) -> None:
    """Adds a piece's rejects, its lines counted from `lines`, to those of its input."""
    for reason, entry in rejects.items():
        total = totals.setdefault(reason, {"reason": reason, "count": 0, "first": []})
        total["count"] += entry["count"]
        places = [
            {"line": lines + line + 1, "byte": byte if byte >= 0 else None}
            for line, byte in entry["first"][: EXAMPLES - len(total["first"])]
        ]
        total["first"] += places


def ledger(inputs: list[Input], records: list[dict[str, Any]]) -> pa.Table:
    """One row for each input and set that it gave documents to, and one with set null for what it did not give:
    rejected documents with reasons and the first places, empty lines; also for an input that gave nothing at all.

    Asserts that no document was lost: those written and those rejected are all that were read.
    """
    rows = []
    pieces: list[list[dict[str, Any]]] = [[] for _ in inputs]
    for record in records:
        for piece in record["pieces"]:
            pieces[piece["input"]].append(piece)
    for source, parts in zip(inputs, pieces, strict=True):
        sets: dict[str, np.ndarray] = {}
        rejects: dict[str, dict[str, Any]] = {}
        lines = blank = 0
        for part in parts:
            for name, counts in part["sets"].items():
                sets[name] = sets.get(name, 0) + np.array(counts, np.int64)
            _merge_rejects(rejects, part["rejects"], lines)
            lines += part["lines"]
            blank += part["blank"]
        rejected = sum(entry["count"] for entry in rejects.values())
        assert sum(int(counts[0]) for counts in sets.values()) + rejected == lines - blank, source
        zero = {"input": source.name, "documents": 0, "tokens": 0, "text_bytes": 0, "rejected": 0, "blank_lines": 0}
        for name in sorted(sets):
            documents, tokens, size = sets[name].tolist()
            rows.append({**zero, "set": name, "documents": documents, "tokens": tokens, "text_bytes": size})
        if rejected or blank or not sets:
            ordered = [rejects[reason] for reason in sorted(rejects)]
            rows.append({**zero, "set": None, "rejected": rejected, "blank_lines": blank, "rejects": ordered})
    return pa.Table.from_pylist(rows, LEDGER)


def set_names(records: list[dict[str, Any]], job: Job) -> list[str]:
    """The sets that a run writes. Without a group key they are known beforehand, and written even when empty."""
    if job.group_key is None:
        return ["", "val"] if job.val_fraction else [""]
    return sorted({name for record in records for name in record["parts"]})


def plan_pairs(name: str, records: list[dict[str, Any]], job: Job, directory: Path, shard_tokens: int) -> list[Pair]:
    parts = [job.part_path(record["task"], name) for record in records if name in record["parts"]]
    dtype = job.vocabulary.dtype.name
    return [Pair(directory, index, dtype, spans) for index, spans in enumerate(cut_spans(parts, shard_tokens))]


def finish_set(
    name: str,
    directory: Path,
    pairs: list[dict[str, Any]],
    table: pa.Table,
    tokenizer_json: bytes,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Writes what stands beside the pairs, the manifest last. Returns the manifest."""
    write_durably(directory / "tokenizer.json", tokenizer_json)
    np.save(directory / "token_bytes.npy", token_bytes(tokenizer_json, vocabulary))
    sync_file(directory / "token_bytes.npy")
    pq.write_table(table, directory / "ledger.parquet")
    sync_file(directory / "ledger.parquet")
    own = [row for row in table.select(["set", "documents", "tokens", "text_bytes"]).to_pylist() if row["set"] == name]
    manifest = write_manifest(
        directory,
        tokenizer=vocabulary.manifest(),
        dtype=vocabulary.dtype,
        text_bytes=sum(row["text_bytes"] for row in own),
        pairs=pairs,
        files=["tokenizer.json", "token_bytes.npy", "ledger.parquet"],
    )
    for key in ("documents", "tokens"):
        assert manifest[key] == sum(row[key] for row in own), (name, key, manifest[key])
    return manifest


def directory_of(output: Path, name: str) -> Path:
    return output.with_name("-".join(filter(None, (output.name, name))))


def refuse_existing(output: Path, names: Iterable[str]) -> None:
    for name in names:
        directory = directory_of(output, name)
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise UserError(f"{directory}: exists already; remove it, or choose another --output")


def commit(output: Path, work: Path) -> list[Path]:
    """Renames the finished sets into place and removes the work folder. Can be interrupted and called again."""
    names = read_json(work / "merged.json", "the list of finished sets")["sets"]
    waiting = [name for name in names if (work / "sets" / directory_of(output, name).name).exists()]
    refuse_existing(output, waiting)
    for name in waiting:
        directory = directory_of(output, name)
        os.rename(work / "sets" / directory.name, directory)
        sync_directory(directory.parent)
    shutil.rmtree(work / "tasks", ignore_errors=True)
    shutil.rmtree(work)
    return [directory_of(output, name) for name in names]


def mark_merged(work: Path, names: list[str]) -> None:
    write_json(work / "merged.json", {"sets": names})
