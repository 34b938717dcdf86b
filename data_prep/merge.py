"""The parts of all tasks -> shard sets, each complete before it appears under its name.

On this machine sets are built in the work folder and renamed into place. A remote store cannot rename: there the pairs go
where they belong, and a set is one when its manifest is there, which comes last.
"""

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcpt.data_prep import store
from fastcpt.data_prep.encoding import Vocabulary, token_bytes
from fastcpt.data_prep.inputs import Input
from fastcpt.data_prep.parts import EXAMPLES, Job, building_folder, refuse_existing, set_folder
from fastcpt.integrity import sync_directory, sync_file, write_durably
from fastcpt.shards import write_manifest

if TYPE_CHECKING:  # Arrow takes a quarter of a second to import, and workers merge without it
    import pyarrow as pa


def _ledger_schema() -> "pa.Schema":
    import pyarrow as pa

    place = pa.struct([("line", pa.int64()), ("byte", pa.int64())])
    rejects = pa.list_(pa.struct([("reason", pa.string()), ("count", pa.int64()), ("first", pa.list_(place))]))
    return pa.schema(
        [
            ("input", pa.string()),
            ("set", pa.string()),
            ("documents", pa.int64()),
            ("tokens", pa.int64()),
            ("text_bytes", pa.int64()),
            ("rejected", pa.int64()),
            ("blank_lines", pa.int64()),
            ("rejects", rejects),
        ]
    )


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


def ledger(inputs: list[Input], records: list[dict[str, Any]]) -> "pa.Table":
    """One row for each input and set that it gave documents to, and one with set null for what it did not give:
    rejected documents with reasons and the first places, empty lines; also for an input that gave nothing at all.

    Asserts that no document was lost: those written and those rejected are all that were read.
    """
    import pyarrow.json

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
    # By way of JSON: for Python's objects Arrow imports pandas, where there is one, in an eighth of a second.
    text = "\n".join(map(json.dumps, rows)).encode()
    form = pyarrow.json.ParseOptions(explicit_schema=_ledger_schema(), unexpected_field_behavior="error")
    return pyarrow.json.read_json(io.BytesIO(text), parse_options=form)


def set_names(records: list[dict[str, Any]], job: Job) -> list[str]:
    """The sets that a run writes. Without a group key they are known beforehand, and written even when empty."""
    if job.group_key is None:
        return ["", "val"] if job.val_fraction else [""]
    return sorted({name for record in records for name in record["parts"]})


def finish_set(
    name: str,
    folder: str,
    pairs: list[dict[str, Any]],
    table: "pa.Table",
    tokenizer_json: bytes,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Writes what stands beside the pairs, the manifest last. Returns the manifest."""
    import pyarrow.parquet as pq

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


def mark_merged(work: str, names: list[str]) -> None:
    store.write_bytes(store.join(work, "merged.json"), json.dumps({"sets": names}).encode(), durable=True)


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
