"""The parts of all tasks -> shard sets, each complete before it appears under its name.

On this machine sets are built in the work folder and renamed into place. A remote store cannot rename: there the pairs go
where they belong, and a set is one when its manifest is there, which comes last.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt import UserError
from fastcpt.data_prep import store
from fastcpt.data_prep.encoding import Vocabulary, token_bytes
from fastcpt.data_prep.inputs import Input
from fastcpt.data_prep.parts import EXAMPLES, Job, whole_documents
from fastcpt.integrity import sync_directory, sync_file, write_durably
from fastcpt.shards import PairWriter, write_manifest

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
    def bytes(self) -> int:
        return sum(span.tokens[1] - span.tokens[0] for span in self.spans) * np.dtype(self.dtype).itemsize


def _lengths(part: str) -> np.ndarray:
    with store.fetched(part.removesuffix(".tokens") + ".lengths") as local:
        return np.fromfile(local, "<i4")


def cut_spans(parts: Iterable[str], shard_tokens: int) -> Iterator[tuple[Span, ...]]:
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
    """Copies a pair's spans, some millions of tokens at a time, if an earlier run has not. A task for an engine."""
    if (done := store.read_bytes(pair.record)) is not None:
        return pair, json.loads(done)
    dtype = np.dtype(pair.dtype)
    with store.staged_files(pair.folder) as local:
        writer = PairWriter(local, f"shard-{pair.index:05d}", dtype)
        for span in pair.spans:
            lengths = _lengths(span.part)[slice(*span.documents)]
            with store.fetched(span.part) as part:
                tokens = np.memmap(part, dtype, "r")[slice(*span.tokens)]
                for documents, stretch in whole_documents(lengths):
                    writer.write(tokens[stretch], lengths[documents])
        entry = writer.close()
    if store.is_remote(pair.record):
        store.write_bytes(pair.record, json.dumps(entry).encode())
    else:
        write_durably(Path(pair.record), json.dumps(entry).encode())
    return pair, entry


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


def plan_pairs(name: str, records: list[dict[str, Any]], job: Job, output: str, shard_tokens: int) -> list[Pair]:
    parts = [job.path(record["parts"][name]) for record in records if name in record["parts"]]
    folder, dtype = building_folder(job.work, output, name), job.vocabulary.dtype.name
    return [
        Pair(folder, index, dtype, spans, job.path(f"pair-{index:05d}-{name}.json"))
        for index, spans in enumerate(cut_spans(parts, shard_tokens))
    ]


def finish_set(
    name: str,
    folder: str,
    pairs: list[dict[str, Any]],
    table: pa.Table,
    tokenizer_json: bytes,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Writes what stands beside the pairs, the manifest last. Returns the manifest."""
    own = [row for row in table.select(["set", "documents", "tokens", "text_bytes"]).to_pylist() if row["set"] == name]
    with store.staged_files(folder) as local:
        write_durably(local / "tokenizer.json", tokenizer_json)
        np.save(local / "token_bytes.npy", token_bytes(tokenizer_json, vocabulary))
        sync_file(local / "token_bytes.npy")
        pq.write_table(table, local / "ledger.parquet")
        sync_file(local / "ledger.parquet")
        manifest = write_manifest(
            local,
            tokenizer=vocabulary.manifest(),
            dtype=vocabulary.dtype,
            text_bytes=sum(row["text_bytes"] for row in own),
            pairs=pairs,
            files=["tokenizer.json", "token_bytes.npy", "ledger.parquet"],
        )
        for key in ("documents", "tokens"):
            assert manifest[key] == sum(row[key] for row in own), (name, key, manifest[key])
    return manifest


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
            raise UserError(f"{folder}: exists already; remove it, or choose another --output")


def mark_merged(work: str, names: list[str]) -> None:
    store.write_bytes(store.join(work, "merged.json"), json.dumps({"sets": names}).encode())


def merged(work: str) -> list[str] | None:
    """The names of the sets, once all of them are built; before that None."""
    data = store.read_bytes(store.join(work, "merged.json"))
    return None if data is None else json.loads(data)["sets"]


def commit(output: str, work: str) -> list[str]:
    """Renames the finished sets into place and removes the work folder. Can be interrupted and called again."""
    names = merged(work)
    assert names is not None
    if not store.is_remote(output):
        waiting = [name for name in names if os.path.exists(building_folder(work, output, name))]
        refuse_existing(output, waiting)
        for name in waiting:
            final = set_folder(output, name)
            os.rename(building_folder(work, output, name), final)
            sync_directory(Path(store.split(final)[0]))
    store.remove_folder(store.join(work, "tasks"))
    store.remove_folder(work)
    return [set_folder(output, name) for name in names]
