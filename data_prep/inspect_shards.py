"""What is in a shard set, as text; and whether every byte of it is what was written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt.data_prep.progress import Meter
from fastcpt.integrity import DamagedError
from fastcpt.shards import ShardSet, read_index

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def inspect(directory: str | Path, decode: int = 0) -> str:
    """The set's tokenizer, counts, lengths, pairs and rejects, and its first `decode` documents as text.

    Raises UserError when `directory` is no shard set, or a damaged one.
    """
    shards = ShardSet(directory)
    manifest = shards.manifest
    tokenizer = manifest["tokenizer"]
    tokens, documents, size = len(shards), shards.documents, manifest["text_bytes"]
    lines = [
        f"set          {directory}",
        f"fingerprint  {shards.fingerprint}",
        f"tokenizer    {tokenizer['fingerprint'][:16]}, {tokenizer['vocab_size']:,} ids",
        f"EOD          {tokenizer['eod_token']!r} = {tokenizer['eod']}",
        f"tokens       {tokens:,} in {manifest['dtype']}",
        f"documents    {documents:,}",
        f"text         {size:,} bytes" + (f", {size / tokens:.3f} a token" if tokens else ""),
    ]
    if documents:
        lengths = np.concatenate(list(shards.document_lengths()))
        quantiles = np.quantile(lengths, QUANTILES, method="lower")
        lines.append("tokens/document")
        lines += [f"  {f'{share:.0%}':<10} {int(length):,}" for share, length in zip(QUANTILES, quantiles)]
        lines.append(f"  {'mean':<10} {tokens / documents:,.1f}")
    lines.append(f"pairs        {len(shards.pairs)}")
    lines += [f"  {pair['name']}  {pair['tokens']:,} tokens, {pair['documents']:,} documents" for pair in shards.pairs]
    if "ledger.parquet" in manifest["files"]:
        lines += _rejects(shards.path / "ledger.parquet")
    return "\n".join([*lines, *(_decoded(shards, decode) if decode > 0 else [])])


def _rejects(path: Path) -> list[str]:
    try:
        rows = pq.read_table(path, columns=["input", "rejected", "rejects"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path}: cannot be read ({error}); restore it from a copy") from None
    lines = [f"inputs       {len({row['input'] for row in rows}):,}"]
    lines.append(f"rejected     {sum(row['rejected'] for row in rows):,} documents")
    for row in rows:
        for reject in row["rejects"] or ():
            first = reject["first"][0]
            byte = "" if first["byte"] is None else f" (byte {first['byte']})"
            lines.append(f"  {row['input']}  {reject['count']:,} {reject['reason']}, first at {first['line']}{byte}")
    return lines


def _decoded(shards: ShardSet, count: int) -> list[str]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str((shards.path / "tokenizer.json").read_text(encoding="utf-8"))
    lines = []
    places = ((pair, index) for pair, entry in enumerate(shards.pairs) for index in range(entry["documents"]))
    for number, (pair, index) in zip(range(count), places):
        ids = shards.document(pair, index).tolist()
        lines += [f"--- document {number}: {len(ids):,} tokens", tokenizer.decode(ids, skip_special_tokens=False)]
    return lines


def verify(directory: str | Path, quiet: bool = False) -> None:
    """Checks every byte of a set against its manifest, and each index against the counts. Raises DamagedError."""
    shards = ShardSet(directory)
    total = sum(pair["bin_bytes"] + pair["idx_bytes"] for pair in shards.pairs)
    with Meter("verify", total, quiet) as meter:
        shards.verify(meter.add)
    for pair in shards.pairs:
        path = shards.path / f"{pair['name']}.idx"
        index = read_index(path)
        tokens, documents = int(index.lengths.sum(dtype=np.int64)), len(index.documents) - 1
        found = {"tokens": tokens, "documents": documents, "dtype": index.dtype.name}
        promised = {"tokens": pair["tokens"], "documents": pair["documents"], "dtype": shards.dtype.name}
        if found != promised:
            raise DamagedError(f"{path}: holds {found}, the manifest says {promised}; prepare the set again")
        starts = np.cumsum(index.lengths, dtype=np.int64) - index.lengths
        if not np.array_equal(index.pointers, starts * index.dtype.itemsize):
            raise DamagedError(f"{path}: its sequences do not follow one another; prepare the set again")
