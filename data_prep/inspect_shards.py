"""What is in a shard set, as text; and whether every byte of it is what was written."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt.data_prep.encoding import open_tokenizer, read_vocabulary
from fastcpt.data_prep.progress import Meter
from fastcpt.integrity import DamagedError
from fastcpt.shards import MANIFEST, ShardSet, read_index, set_fingerprint

WIDTH = 100
BLOCKS = "▏▎▍▌▋▊▉█"  # an eighth of a character to a whole one
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
        lengths, counts = count_lengths(shards)
        last = np.cumsum(counts)
        # The value at rank (n - 1) share of the sorted lengths, rounded down: numpy's method "lower".
        ranks = [int((documents - 1) * share) for share in QUANTILES]
        quantiles = lengths[np.searchsorted(last, ranks, side="right")]
        lines.append("tokens/document")
        lines += [f"  {f'{share:.0%}':<10} {int(length):,}" for share, length in zip(QUANTILES, quantiles)]
        lines.append(f"  {'mean':<10} {tokens / documents:,.1f}")
        lines += histogram(lengths, counts, _can_print(BLOCKS))
    lines.append(f"pairs        {len(shards.pairs)}")
    lines += [f"  {pair['name']}  {pair['tokens']:,} tokens, {pair['documents']:,} documents" for pair in shards.pairs]
    if "ledger.parquet" in manifest["files"]:
        lines += _rejects(shards.path / "ledger.parquet")
    return "\n".join([*lines, *(_decoded(shards, decode) if decode > 0 else [])])


def count_lengths(shards: ShardSet) -> tuple[np.ndarray, np.ndarray]:
    """(the lengths that documents have, ascending; how many documents have each), both (K,) int64.

    Exact, and small for any set: K different lengths need at least K (K + 1) / 2 tokens, so K is at most 707,107 for
    250B tokens. One pair's lengths are in memory at a time.
    """
    lengths = counts = np.empty(0, np.int64)
    for part in shards.document_lengths():
        found, number = np.unique(part, return_counts=True)
        lengths, place = np.unique(np.concatenate((lengths, found.astype(np.int64))), return_inverse=True)
        both = np.concatenate((counts, number.astype(np.int64)))
        counts = np.zeros(len(lengths), np.int64)
        np.add.at(counts, place, both)
    return lengths, counts


def histogram(lengths: np.ndarray, counts: np.ndarray, blocks: bool) -> list[str]:
    """Lines of at most 100 columns: documents by powers of two of their length. What `count_lengths` gives; blocks: draw
    with eighths of characters, else in ASCII."""
    power = np.frexp(lengths)[1]  # 1 for a length of 1, 2 for 2 and 3, 3 for 4 to 7; 0 for 0
    rows = []
    for exponent in range(int(power.min()), int(power.max()) + 1):
        inside = power == exponent
        low, high = (1 << exponent) >> 1, (1 << exponent) - 1
        documents = int(counts[inside].sum())
        rows.append(
            (f"{low:,}" if low >= high else f"{low:,} to {high:,}", documents, int(lengths[inside] @ counts[inside]))
        )
    total, tokens = sum(row[1] for row in rows), max(1, sum(row[2] for row in rows))
    labels = max(len("tokens"), *(len(row[0]) for row in rows))
    numbers = max(len("documents"), *(len(f"{row[1]:,}") for row in rows))
    largest, width = max(row[1] for row in rows), min(40, WIDTH - labels - numbers - 26)
    lines = [f"  {'tokens':>{labels}}  {'documents':>{numbers}}  {'share':>6}  {'of tokens':>9}"]
    for label, documents, size in rows:
        shares = f"{documents / total:>6.1%}  {size / tokens:>9.1%}"
        line = f"  {label:>{labels}}  {documents:>{numbers},}  {shares}  {_bar(documents / largest, width, blocks)}"
        lines.append(line.rstrip())
    return lines


def _bar(share: float, width: int, blocks: bool) -> str:
    """A bar of `share` of the width; anything above nothing is seen."""
    if not blocks:
        return "#" * (max(1, round(share * width)) if share else 0)
    eighths = max(1, round(share * width * 8)) if share else 0
    return BLOCKS[-1] * (eighths // 8) + (BLOCKS[eighths % 8 - 1] if eighths % 8 else "")


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _rejects(path: Path) -> list[str]:
    try:
        rows = pq.read_table(path, columns=["input", "rejected", "rejects"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError("ledger-damaged", f"{path}: cannot be read ({error}); restore it from a copy") from None
    lines = [f"inputs       {len({row['input'] for row in rows}):,}"]
    lines.append(f"rejected     {sum(row['rejected'] for row in rows):,} documents")
    for row in rows:
        for reject in row["rejects"] or ():
            first = reject["first"][0]
            byte = "" if first["byte"] is None else f" (byte {first['byte']})"
            lines.append(f"  {row['input']}  {reject['count']:,} {reject['reason']}, first at {first['line']}{byte}")
    return lines


def _decoded(shards: ShardSet, count: int) -> list[str]:
    tokenizer = open_tokenizer(shards.path / "tokenizer.json")
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
            raise DamagedError(
                "shard-index-disagrees", f"{path}: holds {found}, the manifest says {promised}; prepare the set again"
            )
        starts = np.cumsum(index.lengths, dtype=np.int64) - index.lengths
        if not np.array_equal(index.pointers, starts * index.dtype.itemsize):
            raise DamagedError(
                "shard-index-disagrees", f"{path}: its sequences do not follow one another; prepare the set again"
            )
    _check_claims(shards)


def _check_claims(shards: ShardSet) -> None:
    """What the manifest says beside hashes must follow from the files. Raises DamagedError."""
    manifest, path = shards.manifest, shards.path / MANIFEST
    tokenizer = manifest["tokenizer"]
    vocabulary = read_vocabulary(
        (shards.path / "tokenizer.json").read_bytes(), tokenizer["eod_token"], str(shards.path / "tokenizer.json")
    )
    totals = tuple(manifest[key] for key in ("documents", "tokens", "text_bytes"))
    sets: dict[str, list[int]] = {"": [0, 0, 0]}  # of an empty set the ledger has no row
    for row in pq.read_table(shards.path / "ledger.parquet").to_pylist():
        counts = sets.setdefault(row["set"], [0, 0, 0])
        sets[row["set"]] = [count + row[key] for count, key in zip(counts, ("documents", "tokens", "text_bytes"))]
    claims = {
        "tokenizer": (tokenizer, vocabulary.manifest()),
        "dtype": (manifest["dtype"], vocabulary.dtype.name),
        "tokens": (manifest["tokens"], sum(pair["tokens"] for pair in shards.pairs)),
        "documents": (manifest["documents"], sum(pair["documents"] for pair in shards.pairs)),
        "token_bytes.npy": (len(shards.token_bytes), vocabulary.size),
        "fingerprint": (manifest["fingerprint"], set_fingerprint(tokenizer["fingerprint"], shards.dtype, shards.pairs)),
        "counts": (totals, totals if list(totals) in sets.values() else "those of no set in ledger.parquet"),
    }
    for name, (said, found) in claims.items():
        if said != found:
            raise DamagedError(
                "manifest-disagrees", f"{path}: {name} is {said}, its files make it {found}; prepare the set again"
            )
